"""From a request to its answer: engine, loop, stream, deadline, queue."""
