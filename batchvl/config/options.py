"""What a run was told: frozen dataclasses, filled from flags, the environment, a TOML job file and defaults.

Each option stands here once: command line, `BATCHVL_*` variables, job files, `batchvl.run(...)`, the reference page,
the resume guard and the output's metadata are all made from these fields. `meaning=True` marks what changes the
meaning of an answer or of a row: a run that goes on in an output folder must agree on exactly those.
"""

# ruff: noqa: RUF009 - `option(...)` makes a dataclass field
from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta

from ..errors import OptionError
from .units import Duration, Gpus, Shard, Size, Timeout, dec_hook, enc_hook, explain

DEFAULT_MODEL = "OpenGVLab/InternVL-Chat-V1-5"

Positive = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Count = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Share = Annotated[float, Meta(gt=0, le=1)]


def option(default: Any, help: str, *, meaning: bool = False, metavar: str | None = None) -> Any:
    """A field: its default, the line that explains it, and whether it changes what an answer means."""
    return field(default=default, metadata={"help": help, "meaning": meaning, "metavar": metavar})


@dataclass(frozen=True, slots=True)
class ManifestOptions:
    """Which rows, from which columns"""

    prompt_column: str = option("prompt", "Column of the prompt, or of the list of prompts.", meaning=True)
    image_column: str | None = option(
        None, "Column of the picture, or of the list of pictures. [default: images, else image]", meaning=True
    )
    messages_column: str = option("messages", "Column of OpenAI messages, instead of a prompt.", meaning=True)
    id_column: str = option("id", "Column of the rows' labels.")
    generation_column: str = option("generation", "Column of sampling settings per row.", meaning=True)
    keep: tuple[str, ...] = option((), "Column that goes along into the output; may be repeated.", meaning=True)
    limit: Positive | None = option(None, "Only the manifest's first N rows.", metavar="N")
    shard: Shard = option(Shard(), "Only part I of N parts of the manifest, 0 <= I < N.", metavar="I/N")


@dataclass(frozen=True, slots=True)
class PromptOptions:
    """How a row becomes a question"""

    prompt: str | None = option(
        None,
        "Prompt for every row; {column} stands for the row's value, {prompt} for its own prompt. "
        "[default: the column, else 'describe this image']",
        meaning=True,
    )
    system: str | None = option(None, "System message.", meaning=True)
    number_images: bool = option(False, "Write 'Image-1: ' before the first picture, and so on.", meaning=True)
    special_tokens: Literal["escape", "fail"] = option(
        "escape", "What to do with the model's special tokens in a row's values.", meaning=True
    )


@dataclass(frozen=True, slots=True)
class FetchOptions:
    """Where pictures may come from, and how patiently they are fetched"""

    allow_private: tuple[str, ...] = option(
        (), "Network (CIDR) that pictures' URLs may lead to although it is not public; may be repeated.", metavar="CIDR"
    )
    image_root: tuple[str, ...] = option(
        (), "Folder that pictures may lie in, besides the manifest's; may be repeated.", metavar="DIR"
    )
    max_image_bytes: Size = option(Size(32 * 2**20), "Most bytes of one encoded picture.", metavar="SIZE")
    fetch_timeout: Timeout = option(Timeout(60), "For one picture, all retries included.", metavar="TIME")
    fetch_retries: Count = option(4, "Times that fetching is tried again.", metavar="N")
    fetch_concurrency: Positive = option(64, "Pictures fetched at once.", metavar="N")
    fetch_per_host: Positive = option(16, "Pictures fetched at once from one host.", metavar="N")


@dataclass(frozen=True, slots=True)
class ImageOptions:
    """What a picture may be, and who prepares it"""

    max_image_pixels: Positive = option(100_000_000, "Most pixels of one picture, told by its header.", metavar="N")
    max_images: Positive = option(64, "Most pictures of one row.", metavar="N")
    prepare_timeout: Timeout = option(Timeout(60), "For decoding and preparing one row's pictures.", metavar="TIME")
    look_ahead: Count = option(
        4096, "Rows ahead among which those with the same pictures go together, these read once; 0: none.", metavar="N"
    )
    draft_decode: bool = option(
        False,
        "Decode a large JPEG at 1/2, 1/4 or 1/8 of its size where the model's tiles need no more: faster, and not the "
        "same to the bit.",
        meaning=True,
    )
    image_workers: Positive | None = option(None, "Processes that prepare pictures. [default: the CPUs]", metavar="N")
    arena_bytes: Size | None = option(
        None, "Memory for fetched and prepared pictures. [default: an eighth of the memory, 256MiB to 8GiB an engine]",
        metavar="SIZE",
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """Which model"""

    model: str = option(
        DEFAULT_MODEL, "Hugging Face name, folder, or 'shapes' for the tiny model that batchvl carries.", meaning=True
    )
    revision: str | None = option(None, "Branch, tag or commit of the model.", meaning=True)
    trust_remote_code: bool = option(False, "Run Python code that the model's repository brings.", meaning=True)
    max_tiles: Positive | None = option(
        None, "Most tiles of a picture: fewer are faster. [default: the model's]", meaning=True, metavar="N"
    )
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = option("auto", "The weights' type.", meaning=True)


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """How answers are drawn, unless the row's `generation` tells otherwise"""

    max_new_tokens: Positive = option(512, "Most tokens of an answer.", meaning=True, metavar="N")
    temperature: Annotated[float, Meta(ge=0, le=100)] = option(
        0.0, "0 is greedy: the likeliest token.", meaning=True, metavar="X"
    )
    top_p: Share = option(1.0, "Draw from the likeliest tokens that sum to this share.", meaning=True, metavar="X")
    top_k: Count = option(0, "Draw from the K likeliest tokens; 0 is no limit.", meaning=True, metavar="K")
    repetition_penalty: Annotated[float, Meta(gt=0)] = option(1.0, "Above 1: repeat less.", meaning=True, metavar="X")
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] = option(
        0, "Each row draws with hash(seed, row).", meaning=True, metavar="N"
    )
    stop: tuple[str, ...] = option((), "Text that ends an answer; may be repeated.", meaning=True)


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What answers"""

    engine: Literal["auto", "lmdeploy", "transformers", "fake"] = option("auto", "What runs the model.", meaning=True)
    device: str = option("auto", "auto, cpu, cuda or cuda:N.")
    gpus: Gpus = option(
        Gpus(1), "One engine a GPU, or one for every --tp of them, on so many GPUs; they share the rows.",
        metavar="N|all",
    )  # fmt: skip
    batch_size: Annotated[int, Meta(ge=1, le=65536)] | None = option(
        None, "Rows of a list that the engine is handed. [default: the engine's]", metavar="N"
    )
    engine_option: tuple[str, ...] = option((), "An option of the engine itself; may be repeated.", metavar="KEY=VALUE")
    row_timeout: Timeout = option(Timeout(1800), "For one row in the engine.", metavar="TIME")
    hang_timeout: Timeout = option(
        Timeout(300), "An engine that makes no progress for so long is ended and started again.", metavar="TIME"
    )
    start_timeout: Timeout = option(Timeout(3600), "For loading the model.", metavar="TIME")
    engine_memory: Size | None = option(
        None,
        "Memory of one engine's processes at which they are started afresh. [default: 3/4 of its part of the memory]",
        metavar="SIZE",
    )
    retries: Count = option(2, "Times that a row is asked again after a failure that may pass.", metavar="N")
    max_idle_gpu: Duration = option(
        Duration(120), "Rows that wait for a retry are given up once the engine has idled so long.", metavar="TIME"
    )


@dataclass(frozen=True, slots=True)
class LmdeployOptions:
    """What the engine lmdeploy is told; any other field of its configuration by --engine-option"""

    backend: Literal["auto", "turbomind", "pytorch"] = option(
        "auto", "What computes; auto is TurboMind where it loads and serves the model."
    )
    tp: Positive = option(1, "GPUs that share the model (tensor parallelism).", metavar="N")
    session_len: Positive | None = option(
        None, "Most tokens of prompt, pictures and answer. [default: the model's]", metavar="N"
    )
    cache_max_entry_count: Annotated[float, Meta(gt=0, lt=1)] = option(
        0.8, "Share of the free GPU memory for the k/v cache.", metavar="SHARE"
    )
    model_format: str | None = option(
        None, "How the weights are quantised: awq, gptq, fp8, … [default: as the model says]", meaning=True
    )
    quant_policy: Count = option(
        0, "How the k/v cache is quantised, by LMDeploy's numbers: 8 and 4 (bits), 16 (FP8).", meaning=True, metavar="N"
    )
    chat_template: str | None = option(
        None, "A chat template that LMDeploy knows by name, or a JSON file. [default: the model's]", meaning=True
    )


@dataclass(frozen=True, slots=True)
class OutputOptions:
    """Where answers go, and when the run ends"""

    output: str | None = option(
        None, "Folder of the output, or s3://BUCKET/PREFIX. [default: MANIFEST-batchvl beside it]", metavar="DIR"
    )
    commit_seconds: Duration = option(Duration(1), "Answers are on disk after at most so long.", metavar="TIME")
    upload_seconds: Duration = option(
        Duration(300), "Answers are on an object store, if -o is one, after at most about so long.", metavar="TIME"
    )
    work: str | None = option(
        None, "Folder for what of an output on an object store has to lie on a disk. [default: ~/.local/state/batchvl]",
        metavar="DIR",
    )  # fmt: skip
    part_rows: Positive = option(10_000, "Rows of a part file.", metavar="N")
    accept_failures: str = option("0", "So many rows, or P%, may fail in a complete run.", metavar="N|P%")
    max_failures: str | None = option(None, "Stop once more than so many rows, or P%, have failed.", metavar="N|P%")
    stop_after: Timeout | None = option(
        None, "Stop so long after the start, as on a signal: exit code 75, and the same command goes on.",
        metavar="TIME",
    )  # fmt: skip
    grace: Duration = option(Duration(20), "For rows that are in the engine when the run is stopped.", metavar="TIME")


GROUPS = (
    ManifestOptions, PromptOptions, FetchOptions, ImageOptions,
    ModelOptions, SamplingOptions, EngineOptions, LmdeployOptions, OutputOptions,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class RunOptions:
    """All options of a run, by concern."""

    manifest: ManifestOptions = ManifestOptions()
    prompt: PromptOptions = PromptOptions()
    fetch: FetchOptions = FetchOptions()
    image: ImageOptions = ImageOptions()
    model: ModelOptions = ModelOptions()
    sampling: SamplingOptions = SamplingOptions()
    engine: EngineOptions = EngineOptions()
    lmdeploy: LmdeployOptions = LmdeployOptions()
    output: OutputOptions = OutputOptions()

    @classmethod
    def of(cls, **values: Any) -> RunOptions:
        """Options by their flat names; what is left out or None has its default.

        Raises OptionError for an unknown name or a value that the option cannot have.

        >>> RunOptions.of(model="shapes", fetch_timeout="2m").fetch.fetch_timeout
        120.0
        """
        for name in values:
            if name not in NAMES:
                raise OptionError(f"unknown option {name!r}; the options are {', '.join(sorted(NAMES))}")
        groups = {}
        for group, kind in zip(fields(cls), GROUPS, strict=True):
            own = {f.name: convert(f.name, values[f.name]) for f in fields(kind) if values.get(f.name) is not None}
            groups[group.name] = kind(**own)
        return cls(**groups)

    def flat(self) -> dict[str, Any]:
        """Every option by its flat name."""
        return {
            f.name: getattr(getattr(self, group.name), f.name)
            for group, kind in zip(fields(self), GROUPS, strict=True)
            for f in fields(kind)
        }

    def meaning(self) -> dict[str, Any]:
        """The options that change what an answer means, by flat name, as JSON holds them: the resume guard's list."""
        values = self.flat()
        return {
            f.name: msgspec.to_builtins(values[f.name], enc_hook=enc_hook) for f in all_fields() if f.name in MEANING
        }


def all_fields() -> Iterator[Field[Any]]:
    """Every option's field, group by group."""
    for group in GROUPS:
        yield from fields(group)


OPTION_TYPES = {name: hint for group in GROUPS for name, hint in get_type_hints(group, include_extras=True).items()}
NAMES = frozenset(OPTION_TYPES)
MEANING = frozenset(field.name for field in all_fields() if field.metadata["meaning"])
RETRY_OPTIONS = NAMES - MEANING - {"output", "limit"}
"""Options that a retry of failed rows takes: the meaning of answers stays, and so does the place."""


def convert(name: str, value: Any, where: str | None = None) -> Any:
    """A value from a flag, a variable or a job file as the option's type.

    where: what gave it; the flag by default. Raises OptionError naming that, what was found and what is wanted.

    >>> convert("max_image_bytes", "32MB"), convert("stop", "###")
    (32000000, ('###',))
    """
    hint = OPTION_TYPES[name]
    value = _as_text(value)
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        if get_origin(hint) is tuple:
            value = (value,)
        elif hint in (str, str | None):
            value = str(value)
    elif isinstance(value, list | tuple):
        value = tuple(_as_text(item) for item in value)
    try:
        if hint is Shard:  # msgspec knows dataclasses, and would ask for an object
            return dec_hook(Shard, value)
        if get_origin(hint) is Literal and value not in get_args(hint):
            raise ValueError(f"want one of {', '.join(get_args(hint))}")
        return msgspec.convert(value, hint, strict=not isinstance(value, str), dec_hook=dec_hook)
    except (msgspec.ValidationError, ValueError) as error:
        reason = explain(error)
        found = "" if repr(value) in reason else f"; found {value!r}"
        raise OptionError(f"{where or flag(name)}: {reason}{found}") from None


def _as_text(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def flag(name: str) -> str:
    """The option as it is written on the command line.

    >>> flag("max_new_tokens")
    '--max-new-tokens'
    """
    return "--" + name.replace("_", "-")


def env_variable(name: str) -> str:
    """The environment variable of an option.

    >>> env_variable("model")
    'BATCHVL_MODEL'
    """
    return "BATCHVL_" + name.upper()


def default(found: Field[Any]) -> Any:
    """A field's default, None where it has none of its own."""
    return None if found.default is MISSING else found.default
