"""Models sliced with a basis for each half of a block, against independent logits and the program's own perplexity."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CALIBRATION, MODEL, ROOT, binary, run
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import sparsepack
from sparsepack import FormatError, modeling_sliced
from sparsepack.modeling_sliced import SlicedConfig, SlicedForCausalLM

Slice = Callable[..., Path]
Edit = Callable[[dict[str, torch.Tensor]], object]
IDS = torch.arange(3, 51).view(2, 24)
GOLDEN = load_file(ROOT / "fixtures/golden/slicegpt.safetensors")
# The width at which each family's logits are recorded, and that at which nothing is lost. The mean of OPT's stream is
# taken out, which leaves one direction less.
WIDTHS = {"llama-gqa": (24, 32), "mistral": (32, 40), "qwen2": (24, 32), "opt": (24, 31)}
FAMILIES = list(WIDTHS)
HEAD = pytest.mark.parametrize("head", [False, True], ids=["exit", "head"])
FAMILY = pytest.mark.parametrize("family", FAMILIES)
PACKED = ["--format", "packed", "--prune", "magnitude", "--sparsity", "2:4"]
TOLERANCE = 1e-4


@pytest.fixture(scope="session")
def sliced(tmp_path_factory: pytest.TempPathFactory) -> Slice:
    """A tiny model sliced to a width with the recorded calibration ids, in F32 unless `more` says otherwise."""
    base = tmp_path_factory.mktemp("sliced")

    def make(family: str, width: int, head: bool = False, *more: str) -> Path:
        out = base / "-".join([family, str(width), str(head), *more])
        if not out.is_dir():
            source, text = with_tokenizer(base, family)
            slicing = ["--basis", "block", "--slice-width", width, *(["--slice-head"] if head else [])]
            calibration = ["--calibration", text, "--samples", "4", "--seq-len", "24", "--compute", "f32"]
            run("convert", source, "-o", out, *slicing, *calibration, *(more or ["--dtype", "f32"]))
        return out

    return make


def with_tokenizer(base: Path, family: str) -> tuple[Path, Path]:
    """A tiny model with a tokenizer of one character a token, and the recorded calibration ids as a text."""
    source = base / f"{family}-source"
    if not source.is_dir():
        shutil.copytree(ROOT / "fixtures/tiny" / family, source)
        vocabulary = {"<bos>": 0, "<eos>": 1} | {chr(31 + token): token for token in range(2, 96)}
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.save(str(source / "tokenizer.json"))
        text = "".join(chr(31 + token) for token in GOLDEN[f"{family}.ids"].flatten().tolist())
        (source / "calibration.txt").write_text(text)
    return source, source / "calibration.txt"


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Slice:
    """The trained fixture, sliced from 128 to 96 columns."""
    base = tmp_path_factory.mktemp("trained")

    def make(*more: str) -> Path:
        out = base / "-".join(["model", *more])
        if not out.is_dir():
            run("convert", MODEL, "-o", out, "--basis", "block", "--slice-width", 96, *CALIBRATION, *more)
        return out

    return make


@pytest.fixture
def copy(tmp_path: Path, sliced: Slice) -> Callable[[], Path]:
    """A copy of a sliced model, to be damaged."""
    return lambda: Path(shutil.copytree(sliced("llama-gqa", 24), tmp_path / "copy"))


def logits(model: Any, ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(ids, **kwargs).logits
    return out


def evaluated(family: str) -> torch.Tensor:
    """The ids that the recorded logits belong to."""
    return load_file(ROOT / "fixtures/tiny" / family / "golden.safetensors")["input_ids"][None]


@HEAD
@FAMILY
def test_logits_are_those_of_an_independent_derivation(family: str, head: bool, sliced: Slice) -> None:
    width, _ = WIDTHS[family]
    model = sparsepack.load(sliced(family, width, head))
    wanted = GOLDEN[f"{family}.block.{width}{'.head' if head else ''}.logits"]
    assert isinstance(model, SlicedForCausalLM)
    assert model.config.hidden_size == width
    assert (model.config.exit_size is None) == head
    assert (logits(model, evaluated(family))[0] - wanted).abs().max() < TOLERANCE


@HEAD
@FAMILY
def test_without_a_column_less_the_logits_are_the_dense_ones(family: str, head: bool, sliced: Slice) -> None:
    model = sparsepack.load(sliced(family, WIDTHS[family][1], head))
    wanted = load_file(ROOT / "fixtures/tiny" / family / "golden.safetensors")["logits"]
    assert (logits(model, evaluated(family))[0] - wanted).abs().max() < TOLERANCE


@HEAD
def test_perplexity_is_what_the_program_measures(head: bool, trained: Slice) -> None:
    directory = trained("--dtype", "f32", *(["--slice-head"] if head else []))
    assert math.isclose(perplexity(directory), measured(directory), rel_tol=1e-4)


def perplexity(directory: Path) -> float:
    """Over four windows of 128 tokens of the held-out text, each predicting its tokens but the first."""
    text = (ROOT / "fixtures/text/heldout.txt").read_text()
    ids = Tokenizer.from_file(str(directory / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    windows = torch.tensor(ids[: 4 * 128]).view(4, 128)
    predicted = logits(sparsepack.load(directory, dtype=torch.float32), windows)[:, :-1]
    return float(torch.nn.functional.cross_entropy(predicted.flatten(0, 1), windows[:, 1:].flatten()).exp())


def measured(directory: Path) -> float:
    text = ROOT / "fixtures/text/heldout.txt"
    window = ["--window", "128", "--max-windows", "4", "--compute", "f32", "--json"]
    done = subprocess.run([binary(), "--quiet", "eval", directory, "--text", text, *window], capture_output=True)
    assert done.returncode == 0, done.stderr
    return float(json.loads(done.stdout)["perplexity"])


def test_packed_is_what_it_is_unpacked(trained: Slice, tmp_path: Path) -> None:
    directory = trained(*PACKED)
    model = sparsepack.load(directory)
    assert {model.sparsepack_report.encodings[f"model.layers.0.mlp.{name}_proj.weight"] for name in ("up", "down")} == {
        "sparse24"
    }
    assert model.sparsepack_report.encodings["model.layers.0.mlp_shortcut.weight"] == "dense"
    run("unpack", directory, "-o", tmp_path / "unpacked")
    assert torch.equal(logits(model, IDS), logits(sparsepack.load(tmp_path / "unpacked"), IDS))
    assert math.isclose(perplexity(directory), measured(directory), rel_tol=1e-4)


@pytest.mark.parametrize("more", [["--format", "zst"], ["--format", "compressed-tensors", *PACKED[2:]]], ids="_".join)
def test_other_formats(more: list[str], trained: Slice) -> None:
    plain = trained("--format", "safetensors", *more[2:])
    assert torch.equal(logits(sparsepack.load(trained(*more)), IDS), logits(sparsepack.load(plain), IDS))


@FAMILY
def test_generates_the_same_with_and_without_a_cache(family: str, sliced: Slice) -> None:
    model = sparsepack.load(sliced(family, WIDTHS[family][0]))
    arguments = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 1}
    cached = model.generate(IDS[:1, :8], use_cache=True, **arguments)
    assert torch.equal(cached, model.generate(IDS[:1, :8], use_cache=False, **arguments))
    assert cached.shape == (1, 20)
    # And with a cache in hand, some tokens at once.
    past = model(IDS[:, :10], use_cache=True).past_key_values
    rest = logits(model, IDS[:, 10:], past_key_values=past)
    assert (rest - logits(model, IDS)[:, 10:]).abs().max() < TOLERANCE


@FAMILY
def test_padding_on_the_left_changes_nothing(family: str, sliced: Slice) -> None:
    model = sparsepack.load(sliced(family, WIDTHS[family][0]))
    padded = torch.cat([torch.ones(1, 5, dtype=torch.long), IDS[:1]], dim=1)
    mask = torch.cat([torch.zeros(1, 5, dtype=torch.long), torch.ones_like(IDS[:1])], dim=1)
    assert (logits(model, padded, attention_mask=mask)[:, 5:] - logits(model, IDS[:1])).abs().max() < TOLERANCE


@FAMILY
def test_attention_implementations_agree(family: str, sliced: Slice) -> None:
    model = sparsepack.load(sliced(family, WIDTHS[family][0]))
    assert model.config._attn_implementation == "sdpa"
    theirs = logits(model, IDS)
    model.set_attn_implementation("eager")
    assert (logits(model, IDS) - theirs).abs().max() < TOLERANCE


def test_a_window_limits_attention(sliced: Slice) -> None:
    """Two blocks see three tokens each, so the sixth token is the first that does not know the first one."""
    model = sparsepack.load(sliced("mistral", 40))
    model.config.sliding_window = 3
    other = IDS.clone()
    other[:, 0] = 90
    changed = (logits(model, IDS) - logits(model, other)).abs().amax(dim=(0, 2)) > 1e-6
    assert changed[:5].all()
    assert not changed[5:].any()


def test_hidden_states_and_attentions(sliced: Slice) -> None:
    model = sparsepack.load(sliced("opt", 24))
    model.set_attn_implementation("eager")
    out = model(IDS, output_hidden_states=True, output_attentions=True)
    assert [tuple(state.shape) for state in out.hidden_states] == [(2, 24, 24), (2, 24, 24), (2, 24, 32)]
    assert [tuple(weights.shape) for weights in out.attentions] == [(2, 4, 24, 24)] * 2


@FAMILY
def test_loss_reaches_every_parameter(family: str, sliced: Slice) -> None:
    model = sparsepack.load(sliced(family, WIDTHS[family][0]))
    model.train()
    model.gradient_checkpointing_enable()
    model(IDS, labels=IDS).loss.backward()
    missed = [name for name, value in model.named_parameters() if value.grad is None or not value.grad.any()]
    # A bias of keys shifts all scores of a query alike.
    assert [name for name in missed if not name.endswith("k_proj.bias")] == []


def test_logits_that_are_asked_for(sliced: Slice) -> None:
    model = sparsepack.load(sliced("llama-gqa", 24))
    assert torch.equal(logits(model, IDS, logits_to_keep=1), logits(model, IDS)[:, -1:])


def test_bf16(sliced: Slice) -> None:
    directory = sliced("qwen2", 24, False, "--dtype", "bf16")
    model = sparsepack.load(directory)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    full = logits(sparsepack.load(directory, dtype=torch.float32), IDS)
    assert (logits(model, IDS) - full).abs().max() < 0.05 * full.abs().max()


def test_a_sliced_model_can_be_converted_again(sliced: Slice, tmp_path: Path) -> None:
    run("convert", sliced("opt", 24), "-o", tmp_path / "again", *PACKED)
    assert (tmp_path / "again/modeling_sliced.py").read_bytes() == code()
    model = sparsepack.load(tmp_path / "again")
    assert model.sparsepack_report.encodings["model.decoder.layers.1.fc1.weight"] == "sparse24"
    assert logits(model, IDS).isfinite().all()


# Without sparsepack: the file beside the weights is all that transformers needs.

STOCK = """
import sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
ids, out = torch.arange(3, 51).view(2, 24), {}
for directory in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
    assert not model.training
    out[directory + ":logits"] = model(ids).logits.detach()
    out[directory + ":generated"] = model.generate(ids[:1], max_new_tokens=8, do_sample=False, pad_token_id=1)
assert "sparsepack" not in sys.modules
save_file(out, sys.argv[1])
"""


def code() -> bytes:
    return Path(modeling_sliced.__file__).read_bytes()


def test_transformers_alone(sliced: Slice, tmp_path: Path) -> None:
    """Every family; and one that transformers saved in its turn, of a packed one, which the program reads too."""
    directories = [sliced(family, WIDTHS[family][0], family == "mistral") for family in FAMILIES]
    assert {(directory / "modeling_sliced.py").read_bytes() for directory in directories} == {code()}
    saved = tmp_path / "saved"
    sparsepack.load(sliced("opt", 24, False, *PACKED)).save_pretrained(saved)
    directories.append(saved)
    command = [sys.executable, "-c", STOCK, tmp_path / "out.safetensors", *directories]
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": ""}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "model of type" not in done.stderr
    theirs = load_file(tmp_path / "out.safetensors")
    for directory in directories:
        model = sparsepack.load(directory)
        assert torch.equal(logits(model, IDS), theirs[f"{directory}:logits"])
        generated = model.generate(IDS[:1], max_new_tokens=8, do_sample=False, pad_token_id=1)
        assert torch.equal(generated, theirs[f"{directory}:generated"])
    config = json.loads((saved / "config.json").read_text())
    assert (config["architectures"], config["model_type"]) == (["SlicedOPTForCausalLM"], "sliced_opt")
    run("convert", saved, "-o", tmp_path / "converted", *PACKED)


def test_transformers_does_not_guess_packed_tensors(sliced: Slice) -> None:
    message = (
        r"the checkpoint has no model\.layers\.0\.mlp\.down_proj\.weight and 13 more; if it is packed, load it with "
        r"sparsepack\.load, or unpack it"
    )
    with pytest.raises(ValueError, match=message):
        SlicedForCausalLM.from_pretrained(sliced("llama-gqa", 24, False, *PACKED))


def test_code_beside_the_weights_is_not_run(copy: Callable[[], Path]) -> None:
    directory = copy()
    (directory / "modeling_sliced.py").write_text("raise SystemExit\n")
    assert isinstance(sparsepack.load(directory), SlicedForCausalLM)


# What is wrong.


def rewrite(directory: Path, edit: Edit) -> Path:
    tensors = {name: tensor.clone() for name, tensor in load_file(directory / "model.safetensors").items()}
    edit(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


SHORTCUT = "model.layers.0.attn_shortcut.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(SHORTCUT), rf"{SHORTCUT}: the model has this parameter, the directory does not"),
        (lambda t: t.update({SHORTCUT: torch.eye(32)}), rf"{SHORTCUT}: shape is \[32, 32\] \(expected \[24, 24\]\)"),
        (lambda t: t.update({"lm_head.bias": torch.zeros(96)}), r"lm_head\.bias: the model has no such parameter"),
    ],
    ids=["missing", "shape", "unknown"],
)
def test_wrong_tensors(edit: Edit, message: str, copy: Callable[[], Path]) -> None:
    with pytest.raises(FormatError, match=message):
        sparsepack.load(rewrite(copy(), edit))


def configurations() -> Iterator[tuple[str, Any, str]]:
    yield "model_type", "sliced_gpt2", r"model_type is 'sliced_gpt2' \(expected one of sliced_llama, sliced_mistral, "
    yield "head_dim", None, "config.json of a sliced_llama model has no head_dim"
    yield "rope_parameters", None, "config.json of a sliced_llama model has no rope_parameters"
    yield "tie_word_embeddings", True, "tie_word_embeddings is true, but a sliced model reads and writes in other bases"


@pytest.mark.parametrize(("key", "value", "message"), list(configurations()), ids=lambda value: str(value)[:20])
def test_wrong_configurations(key: str, value: Any, message: str, copy: Callable[[], Path]) -> None:
    directory = copy()
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(FormatError, match=message):
        sparsepack.load(directory)


def test_a_configuration_that_is_written_and_read_again(sliced: Slice, tmp_path: Path) -> None:
    for family in FAMILIES:
        config = SlicedConfig.from_pretrained(sliced(family, WIDTHS[family][0]))
        config.save_pretrained(tmp_path / family)
        again = SlicedConfig.from_pretrained(tmp_path / family)
        ours, theirs = (
            {key: value for key, value in each.to_dict().items() if key != "_name_or_path"} for each in (config, again)
        )
        assert ours == theirs
