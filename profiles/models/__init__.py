"""Models: dimensions, parameters, AnyRes, and what is published of the family."""
