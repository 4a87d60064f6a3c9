"""The user's own questions, answered before and after quantisation."""
