"""The commands of the runtime: ``llava-edge`` itself, ``run`` and its chat."""
