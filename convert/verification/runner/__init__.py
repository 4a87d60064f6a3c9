"""The artifact under test, whole or in parts, and how far its tensors are from others."""
