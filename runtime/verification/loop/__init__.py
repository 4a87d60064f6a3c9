"""The generation loop checked with scripted decoders, and with the model itself."""
