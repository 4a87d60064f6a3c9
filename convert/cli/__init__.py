"""The commands ``convert``, ``build-engine`` and ``verify``."""
