"""State: weights, optimisers and step of a training run, in one safetensors file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from llava_edge.runtime.util.atomic_write import atomic_file

_STEP = "step"


def save_state(
    path: Path,
    model: nn.Module,
    optimizers: Mapping[str, torch.optim.Optimizer],
    step: int,
    settings: str,
) -> None:
    """Write the state; it appears whole or not at all.

    Args:
        path: of the file; an older one is replaced.
        model: all its parameters are kept.
        optimizers: by name; what they hold for each parameter is kept.
        step: steps that are done.
        settings: what the run must agree on when it goes on.
    """
    tensors = {f"model.{name}": value.detach() for name, value in model.state_dict().items()}
    for kind, optimizer in optimizers.items():
        for number, parameter in enumerate(_parameters(optimizer)):
            for key, value in optimizer.state.get(parameter, {}).items():
                held = value if isinstance(value, Tensor) else torch.tensor(float(value))
                tensors[f"{kind}.{number}.{key}"] = held.detach()
    plain = {name: tensor.cpu().clone().contiguous() for name, tensor in tensors.items()}
    with atomic_file(path) as partial:
        save_file(plain, partial, metadata={_STEP: str(step), "settings": settings})


def load_state(
    path: Path,
    model: nn.Module,
    optimizers: Mapping[str, torch.optim.Optimizer],
    settings: str,
) -> int:
    """Put a saved state into model and optimisers.

    Returns:
        Steps that were done.

    Raises:
        ValueError: the file belongs to a run with other settings.
    """
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        if metadata["settings"] != settings:
            raise ValueError(
                f"{path} is of a run with {metadata['settings']}; this run has {settings}. "
                "Give another --out or the same settings."
            )
        tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    prefix = "model."
    model.load_state_dict(
        {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}
    )
    for kind, optimizer in optimizers.items():
        parameters = _parameters(optimizer)
        for name, value in tensors.items():
            owner, _, rest = name.partition(".")
            if owner == kind:
                number, key = rest.split(".")
                parameter = parameters[int(number)]
                # A step count stays on the CPU, as the optimisers keep it.
                held = value if key == _STEP else value.to(parameter.device)
                optimizer.state[parameter][key] = held
    return int(metadata[_STEP])


def _parameters(optimizer: torch.optim.Optimizer) -> Sequence[Any]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
