"""The check on a GPU: small models first."""
