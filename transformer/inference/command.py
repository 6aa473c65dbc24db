"""`transformer generate`: its options, what can be wrong with them, and the way from prompts to texts."""

import dataclasses
import importlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from transformer.arguments import Json, Overrides
from transformer.config import Config, ConfigError, place, write_atomically
from transformer.run_options import RunOptions

if TYPE_CHECKING:
    from transformer.inference.text import Generation

LARGEST = 2**24


@dataclass(frozen=True)
class TextOptions(RunOptions):
    """Write texts with the model of a run: a decoder continues prompts, an encoder-decoder reads and answers them.

    --seed chooses among the texts that may be drawn. The other keys of the configuration, which `transformer train --help`
    lists, can be given too: --parallel.tensor 2.
    """

    prompt: tuple[str, ...] = ("",)
    """Text to continue, or, for an encoder-decoder, to read; several are worked on side by side."""
    prompt_file: str = ""
    """File of prompts: one a line, or records (.jsonl, .parquet) with a field; plain, .gz or .zst."""
    prompt_field: str = ""
    """That field; empty: data.source_field of the run for an encoder-decoder, data.text_field for a decoder."""
    target_prefix: str = ""
    """What every text of an encoder-decoder begins with."""
    chat: bool = False
    """Answer each prompt as a user's turn, by the chat template; without --prompt, line by line what standard input says."""
    system: str = ""
    """What the system says at the begin of each conversation."""
    gap: str = ""
    """Mark that stands in each prompt where a text is to be filled in, by a run of objective fill_in_the_middle."""
    output: str = ""
    """File to write: a text a line, line breaks inside it as spaces, or JSON lines with --json or as .jsonl."""
    batch_size: int = 32
    """Prompts in a batch; prompts of similar length share one."""
    num_samples: int = 1
    """Texts for each prompt; of a beam search the best ones."""
    max_tokens: int = 200
    """New tokens at most; a text ends earlier where the model ends it."""
    stop: tuple[str, ...] = ()
    """Strings that end a text, and are no part of it."""

    temperature: float | None = None
    """Divides the logits; 0 takes the most probable token. None: 0.8, or no drawing where --beams search."""
    top_k: int = 0
    """Draw among this many most probable tokens. 0: among all."""
    top_p: float = 1.0
    """Draw among the fewest most probable tokens that have this probability together."""
    min_p: float = 0.0
    """Draw among the tokens at least this share as probable as the most probable."""
    repetition_penalty: float = 1.0
    """Divides the logits of tokens that have occurred, or multiplies negative ones. 1: none."""

    beams: int = 0
    """Search for the most probable text with this many beams. 0: draw."""
    length_penalty: float = 0.6
    """Exponent of ((5 + tokens) / 6), by which a beam's log-probability is divided. 0: none."""

    draft: str = ""
    """Run of a smaller model with the same tokenizer that proposes tokens; the texts are distributed as without it."""
    draft_tokens: int = 4
    """Tokens that it proposes at a time."""

    as_json: Json = False
    """Print a JSON list, an object a text."""


@dataclass(frozen=True)
class GenerateOptions(TextOptions):
    __doc__ = TextOptions.__doc__
    SHOWN: ClassVar[type] = TextOptions

    config: Overrides = field(default_factory=Config)


def problems_of(options: GenerateOptions) -> list[str]:
    """Returns what is wrong with the options themselves."""
    problems = []

    def expect(is_right: bool, name: str, rule: str) -> None:
        if not is_right:
            problems.append(f"--{name.replace('_', '-')} = {getattr(options, name)}: must be {rule}")

    for name in ("max_tokens", "batch_size", "num_samples", "draft_tokens"):
        expect(0 < getattr(options, name) <= LARGEST, name, f"greater than 0 and at most {LARGEST:,}")
    expect(options.temperature is None or 0 <= options.temperature < float("inf"), "temperature", "at least 0")
    expect(0 <= options.top_k < 2**31, "top_k", f"from 0 to {2**31 - 1}")
    expect(0 < options.top_p <= 1, "top_p", "above 0 and at most 1")
    expect(0 <= options.min_p <= 1, "min_p", "from 0 to 1")
    expect(0 < options.repetition_penalty < float("inf"), "repetition_penalty", "greater than 0")
    expect(0 <= options.beams <= 2**12, "beams", f"from 0 to {2**12}")
    expect(0 <= options.length_penalty < float("inf"), "length_penalty", "at least 0")
    for name in ("prompt", "stop", "target_prefix", "gap"):
        value = getattr(options, name)
        broken = [text for text in ([value] if isinstance(value, str) else value) if not _is_unicode(text)]
        problems += [f"--{name.replace('_', '-')} = {text!r}: is not UTF-8" for text in broken]
    problems += ["--stop = '': an empty text would end every text"] if "" in options.stop else []
    problems += [] if options.prompt else ["--prompt has no value: give one after --prompt"]
    if options.prompt_file and any(options.prompt):
        problems.append("--prompt and --prompt-file are both given: give one")
    if options.beams > 0:
        defaults = TextOptions()
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "stop", "draft")
        given = [name for name in names if getattr(options, name) != getattr(defaults, name)]
        told = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        problems += [f"--beams = {options.beams} searches and draws nothing: leave out {told}"] if given else []
        if options.num_samples > options.beams:
            problems.append(f"--num-samples = {options.num_samples}: --beams = {options.beams} finds no more than that")
    if options.chat or options.system:
        problems += importlib.import_module("transformer.inference.chat").problems_of(options)
    return problems


def _is_unicode(text: str) -> bool:
    return text == text.encode(errors="replace").decode()


def write_texts(options: GenerateOptions, run: Any, config: Config, mesh: Any) -> None:
    """Prints the texts that the options ask for, or writes them to `--output`, in the order of the prompts.

    `run` is the opened run directory. Raises ConfigError for what only the run and the prompts show.
    """
    target = Path(options.output).expanduser() if options.output else None
    if target is not None and not target.parent.is_dir():
        raise ConfigError(f"--output = {options.output!r}: the directory {target.parent} does not exist")
    if options.chat:
        importlib.import_module("transformer.inference.chat").converse(options, run, config, mesh)
        return
    prompts = _prompts(options, run.config)
    if options.gap and run.config.objective.name != "fill_in_the_middle":
        known = f"objective.name = 'fill_in_the_middle', and this run's is {run.config.objective.name!r}"
        raise ConfigError(f"--gap = {options.gap!r}: only a model trained with {known}, can fill it in")
    many = options.num_samples > 1 or len(prompts) > 1 or options.prompt_file or options.output
    # A text is continued where it stands; what is written about a prompt stands alone.
    continues = run.config.model.architecture == "decoder"
    if not many and not (options.as_json or options.beams or options.draft):

        def show(_: int, piece: str) -> None:
            print(piece, end="", flush=True)

        if options.gap:
            before, _, after = prompts[0].partition(options.gap)
        else:
            before, after = prompts[0] if continues else options.target_prefix, ""
        show(0, before)
        _generations(options, run, config, mesh, prompts, show)
        print(after)
        return
    texts = _generations(options, run, config, mesh, prompts)
    records = [{name: value for name, value in dataclasses.asdict(text).items() if value is not None} for text in texts]
    lines = [" ".join((options.target_prefix + text.text).splitlines()) for text in texts]
    if target is not None:
        if options.as_json or target.suffix == ".jsonl":
            lines = [json.dumps(record, ensure_ascii=False) for record in records]
        write_atomically(target, "".join(line + "\n" for line in lines))
    elif options.as_json:
        print(json.dumps(records))
    elif options.prompt_file:
        print("\n".join(lines))
    else:
        for number, text in enumerate(texts):
            before = text.prompt if continues else options.target_prefix
            whole = text.prompt.replace(options.gap, text.text) if options.gap else before + text.text
            print(f"--- {number}\n{whole}")


def _prompts(options: GenerateOptions, config: Config) -> list[str]:
    from transformer.inference.prompts import read_prompts

    if not options.prompt_file:
        return list(options.prompt)
    is_read = config.model.architecture == "encoder_decoder"
    name = options.prompt_field or (config.data.source_field if is_read else config.data.text_field)
    return read_prompts(Path(options.prompt_file).expanduser(), name, config.data.errors)


Method = Callable[[Sequence[str], Sequence[tuple[int, int]]], list[list["Generation"]]]
"""From a batch of prompts and its rows, numbers of prompt and sample, to the texts of each."""


def _generations(
    options: GenerateOptions,
    run: Any,
    config: Config,
    mesh: Any,
    prompts: Sequence[str],
    on_text: Callable[[int, str], None] | None = None,
) -> list["Generation"]:
    """Returns the texts of all prompts, `num_samples` of each, side by side."""
    import jax

    from transformer.checkpointing.loading import load_parameters
    from transformer.inference.prompts import check_prompts
    from transformer.parallel.sharding import use_rules

    with jax.set_mesh(mesh), use_rules(config):
        model, params, _ = load_parameters(run, mesh, options.step, options.best, options.average)
        check_prompts(model, run.tokenizer, prompts, options.max_tokens, options.target_prefix, options.gap)
        method = _method(options, run, config, mesh, model, params, on_text)
        num_draws = 1 if options.beams else options.num_samples
        return in_batches(method, run.tokenizer, prompts, num_draws, options.batch_size)


def in_batches(
    method: Method, tokenizer: Any, prompts: Sequence[str], num_draws: int, batch_size: int
) -> list["Generation"]:
    """Returns the texts that a method finds for all prompts, drawn so many times each, in the prompts' order."""
    from transformer.inference.prompts import batches_by_length

    rows = [(prompt, sample) for prompt in range(len(prompts)) for sample in range(num_draws)]
    repeated = [prompts[prompt] for prompt, _ in rows]
    found: dict[int, list[Generation]] = {}
    for batch in batches_by_length(tokenizer, repeated, batch_size):
        texts = method([repeated[row] for row in batch], [rows[row] for row in batch])
        found |= dict(zip(batch, texts, strict=True))
    return [text for row in range(len(rows)) for text in found[row]]


def _method(
    options: GenerateOptions,
    run: Any,
    config: Config,
    mesh: Any,
    model: Any,
    params: Any,
    on_text: Callable[[int, str], None] | None,
) -> Method:
    """Returns how texts are found: beam search, drawing, or drawing with a draft."""
    from transformer.inference.sampling import Sampling

    given = (model, params, run.tokenizer)
    max_tokens, stop, seed = options.max_tokens, options.stop, config.seed
    prefix = run.config.objective.name == "prefix_lm"
    read: dict[str, Any] = {"begin": options.target_prefix, "gap": options.gap}
    if options.beams:
        from transformer.inference.beam import beam_search

        search = partial(
            beam_search, num_beams=options.beams, alpha=options.length_penalty, num_best=options.num_samples
        )
        return lambda texts, _: search(*given, texts, max_tokens, prefix=prefix, **read)
    temperature = 0.8 if options.temperature is None else options.temperature
    sampling = Sampling(temperature, options.top_k, options.top_p, options.min_p, options.repetition_penalty)
    if not options.draft:
        from transformer.inference.generate import generate

        draw = partial(generate, stop=stop, seed=seed, prefix=prefix, **read, on_text=on_text)
        return lambda texts, rows: [[text] for text in draw(*given, texts, max_tokens, sampling, rows=rows)]
    from transformer.checkpointing.loading import load_parameters
    from transformer.checkpointing.run import load_run
    from transformer.inference.speculative import check_draft, speculate

    other = load_run(place(options.draft))
    draft, draft_params, _ = load_parameters(other, mesh)
    check_draft(model, run.tokenizer, draft, other.tokenizer, options.draft_tokens)
    both = ((model, draft), (params, draft_params), run.tokenizer)
    sees = (prefix, other.config.objective.name == "prefix_lm")
    draw_both = partial(speculate, num_draft_tokens=options.draft_tokens, stop=stop, seed=seed, prefix=sees, **read)

    def draw_with_draft(texts: Sequence[str], rows: Sequence[tuple[int, int]]) -> list[list["Generation"]]:
        found, acceptance = draw_both(*both, texts, max_tokens, sampling, rows=rows)
        told = f"{acceptance.tokens_per_round:.2f} tokens a pass of the model"
        print(f"{len(texts)} texts with a draft: {told}", file=sys.stderr)
        return [[text] for text in found]

    return draw_with_draft
