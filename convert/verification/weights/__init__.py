"""The artifact's weights against the checkpoint's, tensor by tensor."""
