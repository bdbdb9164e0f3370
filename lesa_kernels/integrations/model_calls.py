"""Reads a model's calls: the noise level that they are told, and what they are conditioned on besides.

A history of features serves calls with the same conditions. Tensors are compared by identity, by their memory and by
the counter of what was written to them; only where that shows a difference are values compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lesa_kernels.integrations.outputs import layout_of, uncompiled, version_of

# What tells of the step besides, and what is made from the latents of each step: different in each step of any run.
_OF_THE_STEP = ("sigma", "audio_sigma")
# Which class the output has.
_OF_THE_OUTPUT = ("return_dict",)
_MADE_OF_LATENTS = (
    "controlnet_block_samples",
    "controlnet_single_block_samples",
    "controlnet_hidden_states",
    "audio_hidden_states",
)
# An argument that came so often as another object with the same values is a copy that the loop makes for each call.
_COPIES = 2
# Decimal digits of a LoRA scale.
_SCALE_DIGITS = 9
_COMPARED = (bool, int, float, str, tuple)


class Parameters:
    """The parameters of a model's forward.

    Args:
        names: of all, the one of the latents first.
        timesteps: what the one that tells the model the noise level may be called.

    Attributes:
        watched: what `watch` says of each, and of the arguments so far that a forward takes as **kwargs.
    """

    def __init__(self, names: Sequence[str], timesteps: Sequence[str]) -> None:
        self.names = tuple(names)
        self.timesteps = tuple(timesteps)
        self.watched = {name: self.watch(name) for name in self.names}

    def watch(self, name: str) -> bool | None:
        """Return whether an argument is watched only for whether it is given, None where it is no condition."""
        others = (self.names[0], *self.timesteps, *_OF_THE_STEP, *_OF_THE_OUTPUT)
        if name in others or "timestep" in name:
            return None
        return any(part in name for part in _MADE_OF_LATENTS)


class ForwardCall(NamedTuple):
    """A call of a model that a hook answers.

    Args:
        run: runs the model's forward, compiled or not. No code of this class lies between, as it would be compiled too.
        parameters: of the forward.
        args: of the call.
        kwargs: of the call.
        latents: the first argument.
    """

    run: partial[Any]
    parameters: Parameters
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    latents: Any

    @property
    def told(self) -> Any:
        """The argument that tells the model the noise level, None where there is none."""
        names = self.parameters.names
        for name in self.parameters.timesteps:
            if name in self.kwargs:
                return self.kwargs[name]
            if name in names[: len(self.args)]:
                return self.args[names.index(name)]
        return None

    @property
    def is_told_exactly(self) -> bool:
        """Whether what the model is told is in more than 16 bits."""
        told = self.told
        return not isinstance(told, Tensor) or told.element_size() > 2

    @uncompiled(recursive=False)
    def timestep(self) -> float | None:
        """Return what the model is told of the noise level; waits for the device.

        None where that is not one number in a tensor: a model may be told one of each token.
        """
        told = self.told
        values = told.unique().tolist() if isinstance(told, Tensor) else []
        return float(values[0]) if len(values) == 1 else None

    @uncompiled(recursive=False)
    def largest_timestep(self) -> float | None:
        """Return the largest number that the model is told of the noise level; waits for the device.

        Tokens that are not to change are told of less noise. None where it is told no number.
        """
        told = self.told
        try:
            if isinstance(told, Tensor):
                return float(told.max() if told.numel() > 1 else told) if told.numel() else None
            return float(told) if isinstance(told, int | float) else None
        # Complex numbers, those beyond any float, and tensors without any.
        except (RuntimeError, OverflowError):
            return None

    @uncompiled(recursive=False)
    def retold(self, timestep: float) -> ForwardCall | None:
        """Return a call whose model is told another noise level; None where `timestep` is None."""
        known = self.told
        if self.timestep() is None:
            return None
        # Laid out alike, so that a compiled model needs no other graph.
        other = torch.empty_strided(known.shape, known.stride(), dtype=known.dtype, device=known.device).fill_(timestep)
        args = tuple(other if each is known else each for each in self.args)
        kwargs = {name: other if each is known else each for name, each in self.kwargs.items()}
        before = self.run.args[: len(self.run.args) - len(args)]
        return self._replace(run=partial(self.run.func, *before, *args, **kwargs), args=args, kwargs=kwargs)

    def conditions(self) -> dict[str, Any]:
        """Return the tensors and numbers that the model gets besides, by name, those of lists and dicts by path."""
        watched, leaves = self.parameters.watched, dict[str, Any]()
        given = self.kwargs
        if len(self.args) > 1:
            given = dict(zip(self.parameters.names, self.args, strict=False)) | given
        for name, value in given.items():
            if name not in watched:
                watched[name] = self.parameters.watch(name)
            only_whether = watched[name]
            if only_whether is None:
                continue
            if only_whether:
                leaves[name] = value is not None
            elif value is None or isinstance(value, Tensor):
                leaves[name] = value
            else:
                _flatten_into(leaves, name, value)
        return leaves


def _flatten_into(leaves: dict[str, Any], name: str, value: Any) -> None:
    """Add what a value holds to the leaves."""
    if isinstance(value, Mapping):
        for key, each in value.items():
            _flatten_into(leaves, f"{name}.{key}", each)
    elif isinstance(value, list | tuple):
        for index, each in enumerate(value):
            _flatten_into(leaves, f"{name}[{index}]", each)
    else:
        leaves[name] = value


class Conditions:
    """The conditions of one branch, kept to be compared with those of later calls.

    Args:
        leaves: see `ForwardCall.conditions`.
    """

    def __init__(self, leaves: dict[str, Any]) -> None:
        self._leaves = leaves
        self._versions = {name: version_of(value) for name, value in leaves.items()}
        self._copies: dict[str, int] = {}

    def are_same_objects(self, leaves: dict[str, Any]) -> bool:
        """Whether a call has the very same conditions; reads no tensor's values."""
        known, versions = self._leaves, self._versions
        if len(leaves) != len(known):
            return False
        for name, value in leaves.items():
            if name not in known or value is not known[name]:
                return False
            if versions[name] is not None and value._version != versions[name]:
                return False
        return True

    def differences(self, leaves: dict[str, Any], unwatched: set[str], is_forecast: bool) -> frozenset[str]:
        """Return the names of the conditions that a call has otherwise; may wait for the device.

        Args:
            leaves: of the call.
            unwatched: names that are left out.
            is_forecast: whether the call would be forecast: then a device's copies that are made for each call are
                taken as they are.
        """
        names = {name for name in (*self._leaves, *leaves) if name not in unwatched}
        return frozenset(name for name in names if not self._is_same(name, leaves, is_forecast))

    def adopt(self, leaves: dict[str, Any], is_forecast: bool) -> None:
        """Take the objects of a call with the same conditions as those to compare with, but for those not compared."""
        adopted = dict(leaves)
        for name, value in leaves.items():
            known = self._leaves.get(name)
            if value is not known and isinstance(value, Tensor):
                if known is not None and self._is_taken_as_it_is(name, value, is_forecast):
                    adopted[name] = known
                self._copies[name] = self._copies.get(name, 0) + 1
        self._leaves = adopted
        self._versions = {name: version_of(value) for name, value in adopted.items()}

    def _is_same(self, name: str, leaves: dict[str, Any], is_forecast: bool) -> bool:
        """Whether one condition has the same value."""
        if name not in leaves or name not in self._leaves:
            return False
        known, value = self._leaves[name], leaves[name]
        if not isinstance(known, Tensor) or not isinstance(value, Tensor):
            return value is known or (isinstance(value, _COMPARED) and type(value) is type(known) and value == known)
        if version_of(known) != self._versions[name]:
            return False
        if value is known:
            return True
        try:
            if _kind(known) != _kind(value):
                return False
            if _memory(value) == _memory(known) and version_of(value) == self._versions[name]:
                return True
            return self._is_taken_as_it_is(name, value, is_forecast) or torch.equal(known, value)
        # Sparse and nested tensors and those of some dtypes cannot be compared.
        except RuntimeError:
            return False

    def _is_taken_as_it_is(self, name: str, value: Tensor, is_forecast: bool) -> bool:
        """Whether a tensor is a device's copy, made for each call, on a forecast step, where nothing waits for it."""
        return is_forecast and not value.is_cpu and self._copies.get(name, 0) >= _COPIES


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    """Return a tensor's layout, and how its memory is read."""
    return *layout_of(tensor), tensor.is_conj(), tensor.is_neg()


def _memory(tensor: Tensor) -> tuple[Any, ...]:
    """Return where a strided tensor lies; those that only wrap others, as DTensors do, say nowhere."""
    address = tensor.data_ptr() if tensor.layout == torch.strided else 0
    return (address, tensor.stride()) if address else (id(tensor),)


class LoraState:
    """Tells which LoRA adapters of a model are active, and how they are scaled."""

    def __init__(self) -> None:
        self._names: tuple[str, ...] = ()
        # Of layers; the layers themselves may be taken out of the model.
        self._paths: list[str] = []

    def read(self, model: nn.Module) -> tuple[Any, ...]:
        """Return what changes when adapters are added, taken away, switched, scaled or merged.

        All adapters' names, and the state of the first and the last layer: reading all would take longer than a cached
        step.
        """
        names = tuple(vars(model)["peft_config"])
        if names == self._names:
            try:
                return names, *(_layer_state(model.get_submodule(path)) for path in self._paths)
            except AttributeError:
                # The adapter of that name is another one, of other layers.
                pass
        from peft.tuners.tuners_utils import BaseTunerLayer

        paths = [path for path, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
        self._names, self._paths = names, [*paths[:1], *paths[1:][-1:]]
        return names, *(_layer_state(model.get_submodule(path)) for path in self._paths)


def _layer_state(layer: Any) -> tuple[Any, ...]:
    """Return what says how a LoRA layer acts."""
    # A scale of one call is multiplied in and divided out again, which may round.
    scaling = tuple(
        (name, scale if isinstance(scale, Tensor) else round(scale, _SCALE_DIGITS))
        for name, scale in getattr(layer, "scaling", {}).items()
    )
    return tuple(layer.active_adapters), layer.disable_adapters, tuple(layer.merged_adapters), scaling
