"""Runs diffusers pipelines as a source of trajectories for training."""

from __future__ import annotations

import copy
import functools
import hashlib
import inspect
import itertools
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lesa_kernels.checks import check_decreasing, check_int
from lesa_kernels.integrations.levels import scheduler_incompatibility
from lesa_kernels.integrations.models import find_adapter, find_models, is_pipeline
from lesa_kernels.trajectories import ModelCall, StepPolicy, StopRun, watch

# Arguments that stand for one prompt each, wherever they are given.
_OF_EACH_PROMPT = ("negative_prompt", "negative_pooled_prompt")
_OWN = ("num_inference_steps", "generator")
# Those that print alike are alike; tensors, images and random generators are not.
_READABLE = (str, int, float, type(None), torch.device, torch.dtype)


class PipelineSource:
    """Runs of a diffusers pipeline, one a prompt; nothing is stored, each reading samples them anew.

    A policy answers every call of the transformer: it may run the blocks, leave them out and run what follows on a
    feature of its own, or answer without the model. The pipeline goes on with its answers. A run starts from the same
    noise in any batch. Guidance calls the model in branches of their own (Qwen-Image, Wan), or once with the latents
    twice, [uncond, cond] (SD3). Two transformers that take turns (Wan 2.2) are one source; `ModelCall.model` says which
    runs. Image-to-image starts at a later step, `first_step`, which `fit_solver` alone takes. The pipeline itself must
    not be enabled (`lesa.disable`), and it is left as it was found.

    A batch of texts goes through the text encoders once: what `encode_prompt` returned is kept as long as the source
    lives, in the host's memory (FLUX: 4 MB a prompt in bfloat16). A LoRA that is loaded into a text encoder later, a
    cast and another device are noticed; after any other change of a text encoder, such as of the weight of its LoRA,
    make another source.

    Args:
        pipe: a pipeline with a transformer and a scheduler; offloading, LoRA and torch.compile are as with `enable`.
        prompts: a text each; or a mapping of arguments of the pipeline's call for those who have more or other than a
            text: embeddings, an image, a class label. Arguments of several runs are put together: tensors along their
            first dimension, lists end to end, all else in a list.
        steps: number of sampling steps S.
        seed: run r starts from the noise of a CPU generator with `seed + r`.
        capture: for a model without an adapter: the submodule whose first argument is the feature; see `enable`.
        call_arguments: of every call of the pipeline, such as `height` and `guidance_scale`. One whose name begins with
            "negative_prompt" or "negative_pooled_prompt" is repeated for each prompt. The output is left as latents
            unless `output_type` says more.

    Raises:
        ValueError: when there is no prompt, prompts have different arguments, an argument is the source's own to set,
            the pipeline is enabled already, or there is no adapter for its model.
        TypeError: when pipe is something else, or does not take what the source must pass; or prompts are no sequence.
    """

    def __init__(
        self,
        pipe: Any,
        prompts: Sequence[str | Mapping[str, Any]],
        *,
        steps: int,
        seed: int = 0,
        capture: str | None = None,
        **call_arguments: Any,
    ) -> None:
        # It imports diffusers, which takes seconds.
        from lesa_kernels.integrations.trajectory_hook import AnsweredRun, TrajectoryHook

        self._steps = check_int("steps", steps, 1)
        self._parts = 1  # that each interval of the pipeline's noise levels is divided into
        self._begin = 0  # where finer runs start
        self._encoded = EncodedPrompts()
        _check_pipeline(pipe)
        self._pipe = pipe
        self._seed = seed
        self._capture = capture
        each = {
            name: value
            for name, value in call_arguments.items()
            if name.startswith(_OF_EACH_PROMPT) and value is not None
        }
        self._prompts = _arguments_of(prompts, each)
        self._shared = {name: value for name, value in call_arguments.items() if name not in each}
        _check_names(pipe, {*self._shared, *self._prompts[0]})
        if _accepts(pipe, "output_type"):
            self._shared.setdefault("output_type", "latent")
        self._models = find_models(pipe)
        self._answered = AnsweredRun(pipe)
        self._hooks = [
            TrajectoryHook(model, find_adapter(model, capture), wrappers, self._answered, number)
            for number, (model, wrappers) in enumerate(self._models)
        ]

    def __len__(self) -> int:
        """How many runs there are: one a prompt."""
        return len(self._prompts)

    @property
    def sigmas(self) -> tuple[float, ...]:
        """The S+1 noise levels, known once the pipeline has set its scheduler; the model does not run.

        Raises:
            ValueError: when they cannot be read, do not fall, or are not `steps` + 1.
        """
        return self._start[0]

    @property
    def first_step(self) -> int:
        """The step at which the runs start: 0, or later for image-to-image; found with `sigmas`, and raises alike."""
        return self._start[1]

    @cached_property
    def _start(self) -> tuple[tuple[float, ...], int]:
        """The noise levels and the first step, found by a run that ends before the model does."""

        def stop(call: ModelCall) -> Tensor:
            raise StopRun

        self._probe(stop)
        sigmas = self._answered.sigmas
        if sigmas is None:
            raise ValueError("lesa: the pipeline did not call its transformer, so its noise levels are not known")
        if len(sigmas) != self._steps * self._parts + 1:
            wanted = self._steps * self._parts
            raise ValueError(f"the pipeline must have {wanted} steps as asked for, it has {len(sigmas) - 1}")
        return check_decreasing(sigmas, "the noise levels of the pipeline's scheduler"), self._answered.latest_step

    @property
    def solver_incompatibility(self) -> str | None:
        """Why the scheduler allows no learned solver for these runs; None where it allows one."""
        return scheduler_incompatibility(self._pipe.scheduler)

    def refined(self, parts: int = 4) -> PipelineSource:
        """Return the same runs with finer steps, as a target for `fit_solver`: nearer to the solution of the equation.

        Args:
            parts: each interval between the pipeline's noise levels is divided evenly into so many.

        Returns:
            A source of `parts` times as many steps, which passes all levels of this one, and starts where it does.

        Raises:
            TypeError: when parts is no integer.
            ValueError: when it is below 2, or the pipeline starts its runs in a way that is not known; or see `sigmas`.
        """
        get_timesteps = getattr(self._pipe, "get_timesteps", None)
        if get_timesteps is not None and "sigmas" in inspect.signature(get_timesteps).parameters:
            raise ValueError(f"refined() serves no {type(self._pipe).__name__}, which starts late in a way of its own")
        finer = PipelineSource(
            self._pipe, self._prompts, steps=self._steps, seed=self._seed, capture=self._capture, **self._shared
        )
        finer._parts = self._parts * check_int("parts", parts, 2)
        finer._begin = self.first_step * parts
        finer._encoded = self._encoded
        return finer

    @cached_property
    def branches(self) -> tuple[str, ...]:
        """The branches of guidance that call the model in the first step; this runs it there."""
        found: list[str] = []
        steps: set[int] = set()

        def look(call: ModelCall) -> Tensor | None:
            steps.add(call.step)
            if len(steps) > 1:
                raise StopRun
            found.append(call.branch)
            return watch(call)[1]

        self._probe(look)
        return tuple(found)

    @property
    def model(self) -> str:
        """A name of the features of each model: class, capture point, a hash of the parameters' names and shapes."""
        names = []
        for (model, _), hook in zip(self._models, self._hooks, strict=True):
            shapes = [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]
            digest = hashlib.sha256(repr(shapes).encode()).hexdigest()[:12]
            names.append(f"{type(model).__name__} {hook.adapter.capture or 'output'} {digest}")
        return ", ".join(names)

    @cached_property
    def identity(self) -> str:
        """A hash of what the runs are made from beside the model: prompts, arguments, seed, and who runs when."""
        facts: tuple[object, ...] = (self._steps, self._seed)
        if self._parts > 1:
            facts = (*facts, self._parts)
        if len(self._models) > 1:
            facts = (*facts, getattr(self._pipe.config, "boundary_ratio", None))
        digest = hashlib.sha256(repr(facts).encode())
        for arguments in (*self._prompts, self._shared):
            for name, value in sorted(arguments.items()):
                digest.update(name.encode())
                _digest(value, digest)
        return digest.hexdigest()[:16]

    def run(self, runs: Sequence[int], policy: StepPolicy) -> None:
        """See `TrajectorySource.run`. The policy runs with gradients where this is called with gradients.

        Raises:
            ValueError: when the pipeline is enabled, skips a step on its way, has other sigmas than before, or its
                model needs an adapter.
        """
        last = len(self.sigmas) - 2
        self._run_batch(runs, policy)
        if self._answered.latest_step != last:
            raise ValueError(
                f"the pipeline must call its transformer up to step {last}, its last call was in step "
                f"{self._answered.latest_step}"
            )

    def _probe(self, policy: StepPolicy) -> None:
        """Begin to sample the first run."""
        with suppress(StopRun):
            self._run_batch([0], policy)

    def _run_batch(self, runs: Sequence[int], policy: StepPolicy) -> None:
        _check_pipeline(self._pipe)
        prompts = [self._prompts[run] for run in runs]
        arguments = {name: _together([prompt[name] for prompt in prompts]) for name in prompts[0]}
        generators = [torch.Generator().manual_seed(self._seed + run) for run in runs]
        with ExitStack() as stack:
            # First, as it looks whether gradients are on.
            stack.enter_context(self._answered.answered(policy))
            for hook in self._hooks:
                stack.enter_context(hook.attached())
            stack.enter_context(_silent(self._pipe))
            stack.enter_context(self._encoded.remembered(self._pipe))
            if self._parts > 1:
                stack.enter_context(_divided(self._pipe, self._parts, self._begin))
            stack.enter_context(torch.no_grad())
            try:
                self._pipe(num_inference_steps=self._steps, generator=generators, **arguments, **self._shared)
            except BaseException:
                # Pipelines free their models at the end of a call, which this one did not reach.
                if hasattr(self._pipe, "maybe_free_model_hooks"):
                    self._pipe.maybe_free_model_hooks()
                raise


class EncodedPrompts:
    """What the `encode_prompt` of one pipeline returned, by its arguments, in the host's memory.

    Calls with a tensor, or anything else that cannot be compared by its text, are not kept.
    """

    def __init__(self) -> None:
        self._kept: dict[str, Any] = {}

    @contextmanager
    def remembered(self, pipe: Any) -> Generator[None, None, None]:
        """Let a pipeline encode no prompt again for the length of a with statement; it may have no `encode_prompt`."""
        encode = getattr(pipe, "encode_prompt", None)
        if encode is None:
            yield
            return

        @functools.wraps(encode)
        def remember(*args: Any, **kwargs: Any) -> Any:
            if not _is_readable([*args, *kwargs.values()]):
                return encode(*args, **kwargs)
            key = repr((args, sorted(kwargs.items()), _state(pipe)))
            if key not in self._kept:
                self._kept[key] = _on_host(encode(*args, **kwargs))
            return _given_back(self._kept[key])

        with _replaced(pipe, "encode_prompt", remember):
            yield


class _Tensor(NamedTuple):
    """A copy of a tensor on the host, and the device that it came from."""

    copied: Tensor
    device: torch.device


def _on_host(value: Any) -> Any:
    """Copy the tensors of a result to the host."""
    if isinstance(value, Tensor):
        return _Tensor(value.detach().to("cpu", copy=True), value.device)
    return type(value)(map(_on_host, value)) if isinstance(value, (list, tuple)) else copy.deepcopy(value)


def _given_back(kept: Any) -> Any:
    """Return copies where the tensors came from, as pipelines may write to what they are given."""
    if isinstance(kept, _Tensor):
        return kept.copied.to(kept.device, copy=True)
    return type(kept)(map(_given_back, kept)) if isinstance(kept, (list, tuple)) else copy.deepcopy(kept)


def _is_readable(value: Any) -> bool:
    """Whether an argument that prints alike is alike."""
    return all(map(_is_readable, value)) if isinstance(value, (list, tuple)) else isinstance(value, _READABLE)


def _state(pipe: Any) -> tuple[str, int]:
    """Return where a pipeline runs, and a hash of its parameters' names and types: a cast and a LoRA change them."""
    models = [(name, part) for name, part in vars(pipe).items() if isinstance(part, nn.Module)]
    parameters = [(part, name, each.dtype) for part, model in models for name, each in model.named_parameters()]
    return str(getattr(pipe, "_execution_device", None)), hash(tuple(parameters))


def _check_pipeline(pipe: Any) -> None:
    """Check that a pipeline can be run, before anything is changed."""
    from lesa_kernels.integrations.cache_hooks import find_hook

    if not is_pipeline(pipe):
        raise TypeError(f"pipe must be a pipeline with a transformer and a scheduler, got {type(pipe).__name__}")
    for model, _ in find_models(pipe):
        if find_hook(model) is not None:
            raise ValueError("pipe must not be enabled while it is run: call lesa.disable(pipe) first")
        if getattr(model, "is_cache_enabled", False):
            raise ValueError("the model must have no cache of diffusers enabled; call disable_cache() first")
    for name in _OWN:
        if not _accepts(pipe, name):
            raise TypeError(f"the call of pipe must take {name}, that of {type(pipe).__name__} does not")


def _accepts(pipe: Any, name: str) -> bool:
    parameters = inspect.signature(pipe.__call__).parameters
    return name in parameters or any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values())


def _arguments_of(prompts: Sequence[str | Mapping[str, Any]], each: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the arguments of each run."""
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        raise TypeError(f"prompts must be a sequence of prompts, got {type(prompts).__name__}")
    if not prompts:
        raise ValueError("prompts must hold at least one prompt, got none")
    found = [{**each, **(prompt if isinstance(prompt, Mapping) else {"prompt": prompt})} for prompt in prompts]
    for index, arguments in enumerate(found):
        if set(arguments) != set(found[0]):
            raise ValueError(
                f"prompts[{index}] must have the arguments {sorted(found[0])} as prompts[0], got {sorted(arguments)}"
            )
    return found


def _check_names(pipe: Any, names: set[str]) -> None:
    for name in sorted(names):
        if name in (*_OWN, "num_images_per_prompt", "num_videos_per_prompt"):
            raise ValueError(f"{name} must not be given: a run has steps= steps and one image, its noise is of seed=")
        if not _accepts(pipe, name):
            raise ValueError(f"arguments must be those of the call of {type(pipe).__name__}, which takes no {name}")


def _digest(value: Any, digest: Any) -> None:
    """Add an argument to a hash. Objects without readable contents count by their type."""
    if isinstance(value, Tensor):
        digest.update(repr((value.dtype, tuple(value.shape))).encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    elif isinstance(value, (list, tuple)):
        digest.update(f"{len(value)}".encode())
        for each in value:
            _digest(each, digest)
    elif hasattr(value, "tobytes"):
        digest.update(value.tobytes())
    elif value is None or isinstance(value, (str, int, float)):
        digest.update(repr(value).encode())
    else:
        digest.update(type(value).__qualname__.encode())


def _together(values: list[Any]) -> Any:
    """Return an argument of several runs as that of one call."""
    if all(isinstance(value, Tensor) for value in values):
        return torch.cat(values)
    if all(isinstance(value, list) for value in values):
        return list(itertools.chain.from_iterable(values))
    return values


@contextmanager
def _divided(pipe: Any, parts: int, begin: int) -> Generator[None, None, None]:
    """Divide the intervals between a pipeline's noise levels, and begin late, for the length of a with statement.

    The levels are set once the scheduler has made its own: those that it is given it would shift once more. Where
    image-to-image begins is counted in steps and rounded, so that of finer steps it would be another level.
    """
    scheduler = pipe.scheduler
    set_timesteps = scheduler.set_timesteps

    def divide(levels: Tensor) -> Tensor:
        shares = torch.arange(parts, device=levels.device, dtype=levels.dtype) / parts
        return (levels[:-1, None] + (levels[1:] - levels[:-1])[:, None] * shares).flatten()

    # retrieve_timesteps looks at the names of its arguments.
    @functools.wraps(set_timesteps)
    def set_finer(*args: Any, **kwargs: Any) -> None:
        set_timesteps(*args, **kwargs)
        sigmas, timesteps = scheduler.sigmas, scheduler.timesteps
        end = sigmas[-1:].to(timesteps) * scheduler.config.num_train_timesteps
        scheduler.sigmas = torch.cat([divide(sigmas), sigmas[-1:]])
        scheduler.timesteps = divide(torch.cat([timesteps, end]))
        scheduler.num_inference_steps = len(scheduler.timesteps)

    def begin_late(*args: Any, **kwargs: Any) -> tuple[Tensor, int]:
        scheduler.set_begin_index(begin)
        timesteps = scheduler.timesteps[begin:]
        return timesteps, len(timesteps)

    with ExitStack() as stack:
        stack.enter_context(_replaced(scheduler, "set_timesteps", set_finer))
        if hasattr(pipe, "get_timesteps"):
            stack.enter_context(_replaced(pipe, "get_timesteps", begin_late))
        yield


@contextmanager
def _replaced(target: Any, name: str, method: Callable[..., Any]) -> Generator[None, None, None]:
    """Give an object another method for the length of a with statement."""
    own = vars(target).get(name)
    setattr(target, name, method)
    try:
        yield
    finally:
        if own is None:
            delattr(target, name)
        else:
            setattr(target, name, own)


@contextmanager
def _silent(pipe: Any) -> Generator[None, None, None]:
    """Hide a pipeline's progress bar for the length of a with statement."""
    before = vars(pipe).get("_progress_bar_config")
    pipe._progress_bar_config = {**(before or {}), "disable": True}
    try:
        yield
    finally:
        if before is None:
            del pipe._progress_bar_config
        else:
            pipe._progress_bar_config = before


def load_pipeline(model: str, *, device: str = "cpu", dtype: torch.dtype = torch.float32, offload: bool = False) -> Any:
    """Load a pipeline of diffusers from a folder or a hub id; offloaded, only the part that runs is on the device."""
    from diffusers import DiffusionPipeline

    try:
        pipe = DiffusionPipeline.from_pretrained(model, dtype=dtype)
    except (OSError, ValueError, AttributeError) as error:  # AttributeError: of a class that diffusers does not have
        raise ValueError(f"model must be a folder or a hub id of a diffusers pipeline, got {model}: {error}") from error
    if offload:
        pipe.enable_model_cpu_offload(device=device)
        return pipe
    return pipe.to(device)
