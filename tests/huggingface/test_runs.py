"""import, export and compare, as the command line does them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from references import REFERENCES, write_folder

from transformer import cli
from transformer.arguments import exit_status
from transformer.checkpointing.run import load_run
from transformer.config import ConfigError, ModelConfig
from transformer.data.plain_tokenizers import ByteTokenizer, CharacterTokenizer
from transformer.data.tokenizers import Tokenizer, load_tokenizer
from transformer.huggingface.published import SAMPLES, write_tokenizer
from transformer.inference.text import ends_of

tokenizers = pytest.importorskip("tokenizers")


def a_tokenizer(*special: str) -> Any:
    """Returns a small byte-level BPE of the library, its special tokens first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(["aa ab ba bb"], trainers.BpeTrainer(vocab_size=90, special_tokens=list(special)))
    return made


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A folder as it is published: the tokenizer has a chat template and no token for the begin."""
    reference = json.loads((REFERENCES / "llama.json").read_text())
    folder = tmp_path / "published"
    config = reference["config"] | {"bos_token_id": 0, "eos_token_id": [1, 0]}
    write_folder(folder, config, reference["shapes"], 0)
    a_tokenizer("<|endoftext|>", "<|im_end|>").save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": None, "eos_token": "<|im_end|>"}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 0], "temperature": 0.6}))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Returns a function from the words of a command to its exit status and what it prints."""

    def run(*words: object) -> tuple[int, str]:
        status = exit_status(cli.run, list(map(str, words)))
        told = capsys.readouterr()
        return status, told.out + told.err

    return run


def test_an_export_is_told_by_its_own_class(tmp_path: Path, command: Callable[..., tuple[int, str]]) -> None:
    """Which of the family's it is, the head decides."""
    reference = json.loads((REFERENCES / "bert-model.json").read_text())
    folder, run, out = tmp_path / "published", tmp_path / "run", tmp_path / "out"
    write_folder(folder, reference["config"], reference["shapes"], 0)
    a_tokenizer("[PAD]", "[CLS]", "[SEP]", "[MASK]").save(str(folder / "tokenizer.json"))
    assert command("import", folder, "--workdir", run)[0] == 0
    status, told = command("export", "--workdir", run, "--format", "huggingface", out)
    assert status == 0, told
    assert f"{out}: BertModel of step 0" in told
    assert "| architecture | BertModel (bert), " in (out / "README.md").read_text()


def test_experts_are_split_as_the_model_has_them(tmp_path: Path, command: Callable[..., tuple[int, str]]) -> None:
    """The recipe's own model has none."""
    reference = json.loads((REFERENCES / "mixtral.json").read_text())
    write_folder(tmp_path / "published", reference["config"], reference["shapes"], 0)
    a_tokenizer("<s>", "</s>").save(str(tmp_path / "published" / "tokenizer.json"))
    split = ("--parallel.fsdp", 4, "--parallel.expert", 2)
    status, told = command("import", tmp_path / "published", "--workdir", tmp_path / "run", *split)
    assert status == 0, told
    status, told = command("compare", tmp_path / "run", tmp_path / "published")
    assert status == 0 and "arrays are equal bit by bit" in told


def test_in_out_and_in_again(published: Path, tmp_path: Path, command: Callable[..., tuple[int, str]]) -> None:
    run, out, again = tmp_path / "run", tmp_path / "out", tmp_path / "again"
    one = ("--parallel.fsdp", 8)
    assert command("import", published, "--workdir", run, *one)[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["published", "run"]
    config = json.loads((run / "config.json").read_text())
    assert config["model"]["num_kv_heads"] == 1 and config["data"]["tokenizer_path"] == str(run / "tokenizer")
    tokenizer = load_tokenizer(run / "tokenizer")
    assert (tokenizer.bos, tokenizer.eos) == (0, 1)
    assert ends_of(tokenizer) == (1, 0)

    status, told = command("export", "--workdir", run, "--format", "huggingface", out, "--shard-size", 2e-5)
    assert status == 0, told
    assert "LlamaForCausalLM of step 0" in told
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == [1, 0]
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        assert json_or_text(out / name) == json_or_text(published / name)
    assert (out / "model.safetensors.index.json").exists() and "llama" in (out / "README.md").read_text()

    assert command("import", out, "--workdir", again, *one)[0] == 0
    for other in (published, out, again):
        status, told = command("compare", run, other)
        assert status == 0 and "12 of 12 arrays are equal bit by bit" in told


def json_or_text(path: Path) -> Any:
    return json.loads(path.read_text()) if path.suffix == ".json" else path.read_text()


def test_what_differs_is_told(published: Path, tmp_path: Path, command: Callable[..., tuple[int, str]]) -> None:
    from safetensors.numpy import load_file, save_file

    run = tmp_path / "run"
    assert command("import", published, "--workdir", run, "--parallel.fsdp", 8)[0] == 0
    tensors = load_file(published / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * np.float32(1 + 1e-5)
    save_file(tensors, published / "model.safetensors")
    status, told = command("compare", run, published)
    assert status == 1 and "decoder/final_norm/scale" in told and "11 of 12" in told
    assert command("compare", run, published, "--tolerance", 1e-4)[0] == 0
    config = json.loads((published / "config.json").read_text()) | {"rms_norm_eps": 0.5}
    (published / "config.json").write_text(json.dumps(config))
    status, told = command("compare", run, published, "--tolerance", 1e-4, "--json")
    assert status == 1 and json.loads(told)["config"] == ["model.norm_epsilon = 1e-06, 0.5 in the other"]


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda folder: (folder / "tokenizer.json").unlink(), "has none of tokenizer.json, tokenizer.model"),
        (
            lambda folder: a_tokenizer("<|im_end|>", *map(str, range(95))).save(str(folder / "tokenizer.json")),
            "and the model's embedding has 97 rows",
        ),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x"), "not a safetensors file"),
        (lambda folder: (folder / "config.json").write_text("{}"), "model_type = None is none of"),
        (lambda folder: (folder / "tokenizer_config.json").write_text("["), "tokenizer_config.json is not JSON"),
    ],
)
def test_nothing_is_written_of_a_folder_that_is_wrong(
    spoil: Callable[[Path], Any],
    expected: str,
    published: Path,
    tmp_path: Path,
    command: Callable[..., tuple[int, str]],
) -> None:
    spoil(published)
    status, told = command("import", published, "--workdir", tmp_path / "run", "--parallel.fsdp", 8)
    assert status == 2 and expected in told
    assert [path.name for path in tmp_path.iterdir()] == ["published"]


def test_mistakes_in_the_command(published: Path, tmp_path: Path, command: Callable[..., tuple[int, str]]) -> None:
    status, told = command("import", tmp_path / "gone", "--workdir", tmp_path / "run")
    assert status == 2 and "gone is not a folder" in told
    status, told = command("import", "--workdir", tmp_path / "run")
    assert status == 2 and "PATH is missing" in told
    status, told = command("import", published, "--workdir", published, "--parallel.fsdp", 8)
    assert status == 2 and "is there already" in told
    for words in (("compare", published, tmp_path), ("generate", "--workdir", published)):
        status, told = command(*words)
        assert (
            status == 2 and told.count("error: ") == 1 and "config.json is of a model in Hugging Face's layout" in told
        )
    with pytest.raises(ConfigError, match=r"it has no corpus\.json; of a model in Hugging Face's layout"):
        load_run(published)
    status, told = command("export", "--workdir", tmp_path / "run", tmp_path / "out")
    assert status == 2 and "is not a run directory" in told


def test_what_no_family_can_say_is_named() -> None:
    from transformer.config import ConfigError
    from transformer.huggingface.exporting import family_for

    llama = ModelConfig(vocab_size=97, width=32, norm="rmsnorm", activation="swiglu", num_positions=16)
    assert family_for(llama).model_type == "llama"
    with pytest.raises(ConfigError) as caught:
        family_for(ModelConfig(vocab_size=97, width=32, norm="rmsnorm", activation="swiglu", positions="alibi"))
    assert "no family says what this model is" in str(caught.value)
    assert "model.positions = 'alibi'" in str(caught.value)
    with pytest.raises(ConfigError, match=r"layers = 'attention\.window': llama has 'attention'"):
        family_for(ModelConfig(**{**vars(llama), "layers": "attention.window"}), "llama")


@pytest.mark.parametrize("kind", ["bytes", "characters", "bpe", "unigram"])
def test_tokenizers_of_ours_come_out(kind: str, tmp_path: Path) -> None:
    text = "".join(SAMPLES) + "ab ac the cat sat on the mat"
    made: Tokenizer
    if kind == "bytes":
        made = ByteTokenizer()
    elif kind == "characters":
        made = CharacterTokenizer(text)
    else:
        from transformer.data.new_tokenizer import train_sentencepiece

        made = train_sentencepiece([text * 20], kind, 300)
    made.save(tmp_path / "tokenizer")
    (tmp_path / "out").mkdir()
    assert not write_tokenizer(tmp_path / "tokenizer", made, tmp_path / "out")
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    for sample in (*SAMPLES, text):
        ids = made.encode(sample).tolist()
        assert library.encode(sample, add_special_tokens=False).ids == ids
        assert library.decode(ids) == made.decode(ids)


def test_an_adapter_of_a_published_model_goes_out_and_in_again(
    published: Path, tmp_path: Path, command: Callable[..., tuple[int, str]]
) -> None:
    base, run, out, again = (tmp_path / name for name in ("base", "run", "out", "again"))
    (tmp_path / "text.txt").write_text("aa ab ba bb\n\n" * 500)
    assert command("import", published, "--workdir", base, "--parallel.fsdp", 8)[0] == 0
    adapter = ("--adapter.kind", "lora", "--adapter.base-run", base)
    pace = ("--train.num-steps", 1, "--optimizer.warmup-steps", 0, "--evaluation.every-steps", 0)
    data = ("--data.path", tmp_path / "text.txt", "--data.cache-dir", tmp_path / "cache", "--data.sequence-length", 16)
    status, told = command("train", "--workdir", run, *adapter, *pace, *data)
    assert status == 0, told
    status, told = command("export", "--workdir", run, "--format", "peft", out)
    assert status == 0, told
    status, told = command("import", out, "--workdir", again, *adapter)
    assert status == 0 and "an adapter of rank 8" in told, told
    config = json.loads((again / "config.json").read_text())
    assert config["adapter"]["targets"] == ["*"] and config["adapter"]["alpha"] == 16


def test_a_classifier_by_the_mean_of_a_text_is_not_theirs(
    tmp_path: Path, command: Callable[..., tuple[int, str]]
) -> None:
    reference = json.loads((REFERENCES / "bert-labels.json").read_text())
    write_folder(tmp_path / "published", reference["config"], reference["shapes"], 0)
    a_tokenizer("[PAD]", "[CLS]", "[SEP]", "[MASK]").save(str(tmp_path / "published" / "tokenizer.json"))
    (tmp_path / "data.jsonl").write_text('{"text": "aa ab", "label": "x"}\n')
    by_mean = ("--objective.name", "sequence_classification", "--objective.pooling", "mean")
    data = ("--data.path", tmp_path / "data.jsonl", "--data.text-field", "text", "--data.label-field", "label")
    status, told = command("import", tmp_path / "published", "--workdir", tmp_path / "run", *by_mean, *data)
    assert status == 0, told
    status, told = command("export", "--workdir", tmp_path / "run", "--format", "huggingface", tmp_path / "out")
    assert status == 2 and "objective.pooling = 'mean'" in told, told
    assert not (tmp_path / "out").exists()
