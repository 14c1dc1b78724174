"""The options of a run, each declared once.

The command line, `BATCHVL_*` variables, job files, the keyword arguments of `batchvl.run`, the reference page and the
metadata of the output are all derived from the fields of these dataclasses. `meaning=True` marks an option that changes
what an answer or a row means: a run that resumes in an output directory must use the same value.
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
from .units import Duration, Gpus, Proxy, Shard, Size, Timeout, dec_hook, enc_hook, explain

DEFAULT_MODEL = "OpenGVLab/InternVL-Chat-V1-5"

Positive = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Count = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Share = Annotated[float, Meta(gt=0, le=1)]
Rate = Annotated[float, Meta(gt=0)]


def option(
    default: Any, help: str, *, meaning: bool = False, metavar: str | None = None, is_secret: bool = False
) -> Any:
    """Declare an option as a dataclass field.

    Args:
        default: The default value.
        help: One line for `--help`. It ends in "[default: …]" if `default` itself does not explain the default.
        meaning: Whether the option changes what an answer or a row means.
        metavar: Placeholder of the value in `--help`.
        is_secret: Whether the value may contain a secret, so that errors do not quote it.
    """
    metadata = {"help": help, "meaning": meaning, "metavar": metavar, "is_secret": is_secret}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True)
class ManifestOptions:
    """Which rows and columns of the manifest to read."""

    title = "Manifest options"

    prompt_column: str = option(
        "prompt", "Column with the prompt, or with a list of prompts.", meaning=True, metavar="COLUMN"
    )
    image_column: str | None = option(
        None,
        "Column with the image, or with a list of images. [default: images, else image]",
        meaning=True,
        metavar="COLUMN",
    )
    messages_column: str = option(
        "messages", "Column with OpenAI chat messages, used instead of a prompt.", meaning=True, metavar="COLUMN"
    )
    id_column: str = option("id", "Column with the rows' IDs.", metavar="COLUMN")
    generation_column: str = option(
        "generation", "Column with sampling options for individual rows.", meaning=True, metavar="COLUMN"
    )
    keep: tuple[str, ...] = option((), "Column to copy to the output; repeatable.", meaning=True, metavar="COLUMN")
    limit: Positive | None = option(None, "Process only the first N rows of the manifest.", metavar="N")
    shard: Shard = option(Shard(), "Process only part I of N equal parts of the manifest (0 <= I < N).", metavar="I/N")


@dataclass(frozen=True, slots=True)
class PromptOptions:
    """How a row becomes a prompt."""

    title = "Prompt options"

    prompt: str | None = option(
        None,
        "Prompt for every row; {column} inserts a value of the row, {prompt} the row's own prompt. "
        "[default: the row's prompt, else 'describe this image']",
        meaning=True,
    )
    system: str | None = option(None, "System message.", meaning=True)
    number_images: bool = option(
        False, "Write 'Image-1: ', 'Image-2: ' and so on before the images in the prompt.", meaning=True
    )
    special_tokens: Literal["escape", "fail"] = option(
        "escape", "Escape the model's special tokens in a row's values, or fail the row.", meaning=True
    )


@dataclass(frozen=True, slots=True)
class FetchOptions:
    """Where images may come from, and how they are fetched."""

    title = "Image fetching options"

    allow_private: tuple[str, ...] = option(
        (), "Non-public network that image URLs may lead to, such as 10.0.0.0/8; repeatable.", metavar="CIDR"
    )
    allow_host: tuple[str, ...] = option(
        (), "Host whose addresses need not be public, such as minio.internal or *.internal; repeatable.", metavar="HOST"
    )
    allow_bucket: tuple[str, ...] = option(
        (),
        "Bucket or Hub repository that may be read with this machine's credentials, such as s3://photos, s3://my-*, "
        "abfs://photos@account.dfs.core.windows.net or hf://datasets/me/photos; repeatable.",
        metavar="PATTERN",
    )
    image_root: tuple[str, ...] = option(
        (), "Directory that image files may be in, besides the manifest's; repeatable.", metavar="DIR"
    )
    max_image_bytes: Size = option(Size(32 * 2**20), "Maximum size of an encoded image.", metavar="SIZE")
    fetch_timeout: Timeout = option(Timeout(60), "Time limit for one attempt to fetch an image.", metavar="TIME")
    fetch_deadline: Timeout = option(
        Timeout(300), "Time limit for all attempts to fetch an image, without waits for its host.", metavar="TIME"
    )
    fetch_retries: Count = option(4, "Maximum number of retries of a fetch.", metavar="N")
    fetch_concurrency: Positive = option(
        2048, "Limit of concurrent fetches; the number is raised to it while that speeds them up.", metavar="N"
    )
    fetch_per_host: Positive = option(
        32, "Maximum number of concurrent fetches from one host; four times as many from a bucket.", metavar="N"
    )
    fetch_processes: Count = option(
        0, "Number of processes that fetch, beside the one that decides; 0: that one fetches itself.", metavar="N"
    )
    host_rate: Rate | None = option(
        None, "Maximum number of requests per second to one host. [default: what the host accepts]", metavar="X"
    )
    user_agent: str | None = option(
        None, "User-Agent header. [default: batchvl's name, version and address]", metavar="TEXT"
    )
    contact: str | None = option(
        None, "Email address or URL for the owners of the hosts, added to the User-Agent header.", metavar="TEXT"
    )
    proxy: Proxy | None = option(
        None,
        "HTTP proxy for all http and https requests, such as http://proxy.example.org:3128. [default: none, whatever "
        "http_proxy and https_proxy say]",
        metavar="URL",
        is_secret=True,
    )
    host_headers: str | None = option(
        None, "File (TOML) with headers for requests to certain hosts, such as bearer tokens.", metavar="FILE"
    )
    ignore_opt_out: bool = option(
        False, "Fetch images although their servers opt them out of use for AI (X-Robots-Tag: noai, noimageai)."
    )
    host_patience: Duration = option(
        Duration(30), "Set the images of a host aside once it has not responded for this time.", metavar="TIME"
    )
    cache: str | None = option(
        None, "Directory that keeps fetched images for later runs and for other processes.", metavar="DIR"
    )
    cache_bytes: Size = option(
        Size(10 * 2**30),
        "Approximate maximum size of that directory; the least recently used images are removed.",
        metavar="SIZE",
    )
    cache_age: Duration = option(
        Duration(30 * 86400), "Use an image from that directory for this time after it was fetched.", metavar="TIME"
    )


@dataclass(frozen=True, slots=True)
class ImageOptions:
    """Which images are accepted, and how they are prepared for the model."""

    title = "Image preparation options"

    max_image_pixels: Positive = option(
        100_000_000, "Maximum number of pixels of an image, according to its header.", metavar="N"
    )
    max_images: Positive = option(64, "Maximum number of images per row.", metavar="N")
    prepare_timeout: Timeout = option(
        Timeout(60), "Time limit for decoding and preparing the images of a row.", metavar="TIME"
    )
    look_ahead: Count = option(
        4096, "Look-ahead, in rows, for grouping rows that share images; 0 disables it.", metavar="N"
    )
    draft_decode: bool = option(
        False,
        "Decode large JPEGs at 1/2, 1/4 or 1/8 of their size if the model needs no more pixels: faster, but pixel "
        "values differ slightly.",
        meaning=True,
    )
    image_workers: Positive | None = option(
        None, "Number of processes that prepare images. [default: number of CPUs + 1]", metavar="N"
    )
    arena_bytes: Size | None = option(
        None,
        "Memory for fetched and prepared images. [default: 1/8 of the memory, from 256MiB to 8GiB per replica]",
        metavar="SIZE",
    )


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """Which model to run."""

    title = "Model options"

    model: str = option(
        DEFAULT_MODEL,
        "Name on the Hugging Face Hub, local directory, or 'shapes' for the built-in demo model.",
        meaning=True,
        metavar="MODEL",
    )
    revision: str | None = option(None, "Branch, tag or commit of the model.", meaning=True, metavar="REVISION")
    trust_remote_code: bool = option(False, "Run Python code from the model's repository.", meaning=True)
    max_tiles: Positive | None = option(
        None, "Maximum number of tiles per image; fewer are faster. [default: the model's]", meaning=True, metavar="N"
    )
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = option("auto", "Data type of the weights.", meaning=True)


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """How answers are generated, unless the row's `generation` column says otherwise."""

    title = "Sampling options"

    max_new_tokens: Positive = option(512, "Maximum number of tokens in an answer.", meaning=True, metavar="N")
    temperature: Annotated[float, Meta(ge=0, le=100)] = option(
        0.0, "Sampling temperature; 0 is greedy decoding.", meaning=True, metavar="X"
    )
    top_p: Share = option(
        1.0, "Sample from the most likely tokens whose probabilities add up to X.", meaning=True, metavar="X"
    )
    top_k: Count = option(0, "Sample from the K most likely tokens; 0 is no limit.", meaning=True, metavar="K")
    repetition_penalty: Annotated[float, Meta(gt=0)] = option(
        1.0, "Penalty on tokens that occurred before; 1 is none.", meaning=True, metavar="X"
    )
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] = option(
        0, "Seed of random sampling, combined with the row's number.", meaning=True, metavar="N"
    )
    stop: tuple[str, ...] = option((), "Text that ends an answer; repeatable.", meaning=True)


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Which engine runs the model, on which devices, and how failures are handled."""

    title = "Engine options"

    engine: Literal["auto", "lmdeploy", "transformers", "fake"] = option(
        "auto",
        "Engine that runs the model; auto is lmdeploy if it is installed and a GPU is available, else transformers.",
        meaning=True,
    )
    device: str = option("auto", "auto, cpu, cuda or cuda:N.", metavar="DEVICE")
    gpus: Gpus = option(Gpus(1), "GPUs to use; one replica per --tp GPUs, all sharing the rows.", metavar="N|all")
    batch_size: Annotated[int, Meta(ge=1, le=65536)] | None = option(
        None, "Maximum number of rows per batch. [default: the engine's]", metavar="N"
    )
    engine_option: tuple[str, ...] = option((), "Option specific to the engine; repeatable.", metavar="KEY=VALUE")
    row_timeout: Timeout = option(Timeout(1800), "Time limit for a row in the engine.", metavar="TIME")
    hang_timeout: Timeout = option(
        Timeout(300), "Restart an engine that makes no progress for this time.", metavar="TIME"
    )
    start_timeout: Timeout = option(Timeout(3600), "Time limit for loading the model.", metavar="TIME")
    engine_memory: Size | None = option(
        None, "Restart an engine whose memory exceeds this. [default: 3/4 of the memory per replica]", metavar="SIZE"
    )
    retries: Count = option(2, "Maximum number of retries of a row after a transient failure.", metavar="N")
    max_idle_gpu: Duration = option(
        Duration(120),
        "Give up on rows that wait for a retry once the engine has been idle for this time.",
        metavar="TIME",
    )


@dataclass(frozen=True, slots=True)
class LmdeployOptions:
    """Options of the engine lmdeploy. Its other settings are available through `--engine-option`."""

    title = "LMDeploy options"

    backend: Literal["auto", "turbomind", "pytorch"] = option(
        "auto", "Backend; auto is turbomind if it can be loaded and supports the model, else pytorch."
    )
    tp: Positive = option(1, "Number of GPUs per replica (tensor parallelism).", metavar="N")
    session_len: Positive | None = option(
        None, "Maximum number of tokens in prompt, images and answer. [default: the model's]", metavar="N"
    )
    cache_max_entry_count: Annotated[float, Meta(gt=0, lt=1)] = option(
        0.8, "Share of the free GPU memory for the KV cache.", metavar="X"
    )
    model_format: str | None = option(
        None,
        "Quantization of the weights: awq, gptq, fp8 and others. [default: read from the model's configuration]",
        meaning=True,
        metavar="FORMAT",
    )
    quant_policy: Count = option(
        0, "Quantization of the KV cache: 0 (none), 4 or 8 (bits), 16 (FP8).", meaning=True, metavar="N"
    )
    chat_template: str | None = option(
        None,
        "Name of a chat template of LMDeploy, or a JSON file. [default: the model's]",
        meaning=True,
        metavar="NAME|FILE",
    )


@dataclass(frozen=True, slots=True)
class OutputOptions:
    """Where results go, and when a run stops."""

    title = "Output options"

    output: str | None = option(
        None, "Output directory, or s3://BUCKET/PREFIX. [default: MANIFEST-batchvl, next to MANIFEST]", metavar="DIR"
    )
    commit_seconds: Duration = option(Duration(1), "Maximum time until an answer is on disk.", metavar="TIME")
    upload_seconds: Duration = option(
        Duration(300), "Approximate maximum time until an answer is on the object store.", metavar="TIME"
    )
    work: str | None = option(
        None, "Local working directory for output on an object store. [default: ~/.local/state/batchvl]", metavar="DIR"
    )
    part_rows: Positive = option(10_000, "Number of rows per part file.", metavar="N")
    accept_failures: str = option("0", "Failed rows allowed for exit code 0: a number or P%.", metavar="N|P%")
    max_failures: str | None = option(None, "Stop when more rows have failed: a number or P%.", metavar="N|P%")
    stop_after: Timeout | None = option(
        None, "Stop after this time, with exit code 75; the same command resumes the run.", metavar="TIME"
    )
    grace: Duration = option(
        Duration(20), "Time for rows in the engine to finish when the run is stopped.", metavar="TIME"
    )


GROUPS = (
    ManifestOptions,
    PromptOptions,
    FetchOptions,
    ImageOptions,
    ModelOptions,
    SamplingOptions,
    EngineOptions,
    LmdeployOptions,
    OutputOptions,
)


@dataclass(frozen=True, slots=True)
class RunOptions:
    """All options of a run, by group."""

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
        """Return the options with these values. Options that are left out or None have their defaults.

        Raises:
            OptionError: A name is unknown or a value is invalid.

        >>> RunOptions.of(model="shapes", fetch_timeout="2m").fetch.fetch_timeout
        120.0
        """
        for name in values:
            if name not in NAMES:
                raise OptionError(f"unknown option {name!r}; the options are {', '.join(sorted(NAMES))}")
        groups = {}
        for group, group_type in zip(fields(cls), GROUPS, strict=True):
            group_values = {
                f.name: convert(f.name, values[f.name]) for f in fields(group_type) if values.get(f.name) is not None
            }
            groups[group.name] = group_type(**group_values)
        return cls(**groups)

    def flat(self) -> dict[str, Any]:
        """Return every option's value by its name."""
        return {
            f.name: getattr(getattr(self, group.name), f.name)
            for group, group_type in zip(fields(self), GROUPS, strict=True)
            for f in fields(group_type)
        }

    def meaning(self) -> dict[str, Any]:
        """Return the options that change what an answer means, by name, as JSON represents their values."""
        values = self.flat()
        return {
            f.name: msgspec.to_builtins(values[f.name], enc_hook=enc_hook) for f in all_fields() if f.name in MEANING
        }


def all_fields() -> Iterator[Field[Any]]:
    """Yield the field of every option, group by group."""
    for group in GROUPS:
        yield from fields(group)


def _types(group: type) -> dict[str, Any]:
    hints = get_type_hints(group, include_extras=True)
    return {f.name: hints[f.name] for f in fields(group)}


OPTION_TYPES = {name: hint for group in GROUPS for name, hint in _types(group).items()}
NAMES = frozenset(OPTION_TYPES)
MEANING = frozenset(field.name for field in all_fields() if field.metadata["meaning"])
SECRET = frozenset(field.name for field in all_fields() if field.metadata["is_secret"])
RETRY_OPTIONS = NAMES - MEANING - {"output", "limit"}
"""Options that a retry of failed rows accepts: those that change neither what an answer means nor where it is."""
FETCH_COMMAND_OPTIONS = frozenset(
    field.name for group in (ManifestOptions, FetchOptions, ImageOptions) for field in fields(group)
) - {"keep", "draft_decode"} | {"output", "accept_failures", "max_failures", "stop_after"}
"""Options that `batchvl fetch` shares with a run."""
FileFormat = Literal["parquet", "tar"]
"""Where `batchvl fetch` puts images: in the Parquet files of rows, or in tars that these point at."""
FILE_FORMATS: tuple[FileFormat, ...] = get_args(FileFormat)


def convert(name: str, value: Any, source: str | None = None) -> Any:
    """Convert a value from a flag, a variable or a job file to the option's type.

    Args:
        name: The option's name.
        value: The value.
        source: Where the value comes from, for error messages; the flag by default.

    Raises:
        OptionError: The value is invalid.

    >>> convert("max_image_bytes", "32MB"), convert("stop", "###")
    (32000000, ('###',))
    """
    hint = OPTION_TYPES[name]
    value = _path_to_text(value)
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        if get_origin(hint) is tuple:
            value = (value,)
        elif hint in (str, str | None):
            value = str(value)
    elif isinstance(value, list | tuple):
        value = tuple(_path_to_text(item) for item in value)
    try:
        if hint is Shard:  # msgspec would decode a dataclass from an object
            return dec_hook(Shard, value)
        if get_origin(hint) is Literal and value not in get_args(hint):
            raise ValueError(f"expected one of {', '.join(get_args(hint))}")
        return msgspec.convert(value, hint, strict=not isinstance(value, str), dec_hook=dec_hook)
    except (msgspec.ValidationError, ValueError) as error:
        found = "" if name in SECRET else f"; found {value!r}"
        raise OptionError(f"{source or flag(name)}: {explain(error)}{found}") from None


def _path_to_text(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def flag(name: str) -> str:
    """Return the flag of an option.

    >>> flag("max_new_tokens")
    '--max-new-tokens'
    """
    return "--" + name.replace("_", "-")


def env_variable(name: str) -> str:
    """Return the environment variable of an option.

    >>> env_variable("model")
    'BATCHVL_MODEL'
    """
    return "BATCHVL_" + name.upper()


def default(field: Field[Any]) -> Any:
    """Return the default of a field, or None if it has none."""
    return None if field.default is MISSING else field.default
