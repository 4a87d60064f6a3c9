/* cuRAND: the provider is linked with it and calls nothing of it. */

typedef int unused;
