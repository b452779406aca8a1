"""The command line: what it prints where, its exit codes, and Ctrl-C."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest
from tiny import exact, tiny
from typer.testing import CliRunner

import mimo_jax as mj
from mimo_jax import checkpoint, cli
from mimo_jax.api import load
from mimo_jax.cli.generate import _print_statistics
from mimo_jax.decoding.outputs import Completion, GenerationOutput, Metrics

PROMPT = "import os\n\n\ndef main():\n"


def run(*args: str, **options: Any):
    return CliRunner().invoke(cli.app, args, prog_name="mimo-jax", **options)


@pytest.fixture
def loaded(monkeypatch) -> mj.LanguageModel:
    """mimo-tiny, which commands then get without loading it again."""
    monkeypatch.setattr(mj, "load", lambda *args, **options: tiny())
    return tiny()


class FakeStream:
    """Yields pieces of text, or raises those that are exceptions."""

    def __init__(self, pieces: tuple[Any, ...]):
        self.pieces, self.text = pieces, ""

    def __iter__(self) -> Iterator[str]:
        for piece in self.pieces:
            if not isinstance(piece, str):
                raise piece
            self.text += piece
            yield piece

    @property
    def output(self) -> GenerationOutput:
        n = len(self.text)
        metrics = Metrics(ttft_s=0.5, tpot_s=0.1, prompt_tokens=3, generated_tokens=n)
        return GenerationOutput([1, 2, 3], (Completion(self.text, [7] * n, "length"),), metrics)


@pytest.fixture
def streaming(monkeypatch):
    """Makes the model write given pieces."""

    def use(*pieces: Any) -> None:
        class Model:
            tokenizer = "any"

            def stream(self, prompt: Any, params: mj.SamplingParams, **how: Any) -> FakeStream:
                return FakeStream(pieces)

        monkeypatch.setattr(mj, "load", lambda *args, **options: Model())

    return use


def test_help_needs_neither_jax_nor_transformers():
    code = """
import sys
from mimo_jax.cli import main
sys.argv[1:] = ["--help"]
try:
    main()
except SystemExit as end:
    heavy = {"jax", "flax", "transformers", "numpy"} & sys.modules.keys()
    sys.exit(end.code or ", ".join(heavy) or 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "generate" in done.stdout
    assert "inspect" in done.stdout


def test_version():
    assert run("--version").stdout == f"mimo-jax {mj.__version__}\n"


def test_generate_writes_the_completion_and_nothing_else_to_stdout(loaded):
    result = run("generate", "--prompt", PROMPT, "--max-tokens", "24", "--seed", "5")
    params = mj.SamplingParams(max_tokens=24, seed=5)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == "".join(loaded.stream(PROMPT, params))
    assert f"prefill: {len(loaded.encode(PROMPT))} tokens" in result.stderr
    assert "decode: 24 tokens" in result.stderr
    assert "finish reason: length" in result.stderr


def test_every_sampling_option_arrives(monkeypatch):
    seen = []

    class Model:
        tokenizer = "any"

        def stream(self, prompt: Any, params: mj.SamplingParams, **how: Any) -> FakeStream:
            seen.extend([prompt, params, how])
            return FakeStream(("x",))

    def load(model: str, **options: Any) -> Model:
        seen.extend([model, options])
        return Model()

    monkeypatch.setattr(mj, "load", load)
    options = (
        "--model m --chat --max-tokens 5 --temperature 0.5 --top-p 0.9 --top-k 7 --min-p 0.1 "
        "--seed 3 --stop a --stop b --dtype float32 --dequantize --qkv plain --prompt hi "
        "--mesh tensor=2 --rules throughput --random-weights 4 --layers 2 --kernels triton "
        "--speculative mtp --draft-width 3"
    )
    result = run("generate", *options.split())
    assert result.exit_code == 0, result.stderr
    model, load_options, prompt, params, how = seen
    assert how == {"speculative": "mtp", "draft_width": 3}
    assert model == "m"
    assert load_options == {
        "dtype": "float32",
        "dequantize": True,
        "qkv": "plain",
        "mesh": "tensor=2",
        "rules": "throughput",
        "random_weights": 4,
        "layers": 2,
        "drafters": True,
        "kernels": "triton",
        "progress": True,
    }
    assert prompt == [{"role": "user", "content": "hi"}]
    assert params == mj.SamplingParams(
        max_tokens=5, temperature=0.5, top_p=0.9, top_k=7, min_p=0.1, seed=3, stop=["a", "b"]
    )


def test_a_dash_reads_the_prompt_from_stdin(loaded):
    options = ("--max-tokens", "4", "--temperature", "0")
    piped = run("generate", "--prompt", "-", *options, input=PROMPT)
    assert piped.stdout == run("generate", "--prompt", PROMPT, *options).stdout


def test_model_text_is_not_markup_and_arrives_unchanged_in_a_pipe(streaming):
    text = ("[bold]a[/bold] [/] :smile: ", "\x1b[31m\r\tß" + 200 * "long " + "\n", "[link")
    streaming(*text)
    assert run("generate", "--prompt", "x").stdout_bytes == "".join(text).encode()


def test_a_terminal_shows_the_prompt_and_no_raw_control_characters(streaming, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    streaming("a\x1b]0;title\x07", "b")
    out = run("generate", "--prompt", "the prompt").stdout
    assert out == "\x1b[2mthe prompt\x1b[0ma␛]0;title␇b\n"


def test_statistics_count_no_compilation(monkeypatch, capsys):
    from rich.console import Console

    metrics = Metrics(ttft_s=3.0, tpot_s=0.5, prompt_tokens=10, generated_tokens=9)
    output = GenerationOutput([1] * 10, (Completion("", [1] * 9, "stop"),), metrics)

    class Clock:
        def seconds(self, until: float = 200.0) -> float:
            return sum(s for at, s in ((99.0, 5.0), (102.0, 1.0), (104.0, 2.0)) if at <= until)

    err = Console(stderr=True, soft_wrap=True)
    _print_statistics(err, output, False, Clock(), 5.0, (100.0, 107.0))  # type: ignore[arg-type]
    assert capsys.readouterr().err.splitlines() == [
        "prefill: 10 tokens, 5.0 tokens/s; first token after 3.00 s, 1.00 s of it compiling",
        "decode: 9 tokens, 4.0 tokens/s; 2.00 s of compiling not counted",
        "finish reason: stop",
    ]


def test_ctrl_c_keeps_the_text_so_far(streaming):
    streaming("so ", "far", KeyboardInterrupt())
    result = run("generate", "--prompt", "x")
    assert (result.exit_code, result.stdout) == (130, "so far")
    assert "decode: 6 tokens" in result.stderr
    assert "finish reason: interrupted" in result.stderr


def test_ctrl_c_while_loading(monkeypatch):
    def load(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(mj, "load", load)
    result = run("generate", "--prompt", "x")
    assert (result.exit_code, result.stdout) == (130, "")
    assert "interrupted" in result.stderr


def test_ctrl_c_in_a_real_process():
    # Greedy, this prompt goes round in circles until the context is full: there is time.
    prompt = "class T(unittest.TestCase):\n    def setUp(self):\n        self.a = 1\n"
    options = ("--temperature", "0", "--max-tokens", "4000")
    command = [sys.executable, "-m", "mimo_jax", "generate", "--prompt", prompt, *options]
    # What a shell runs in the background ignores Ctrl-C, and so do its children.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    signal.signal(signal.SIGINT, before)
    with process:
        assert process.stdout is not None
        begin = process.stdout.read(50)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
    assert process.returncode == 130, err.decode()
    assert len(begin + out) >= 50
    assert "finish reason: interrupted" in err.decode()
    assert "Traceback" not in err.decode()


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["--model", "mimo-tinny"], 2, "did you mean 'mimo-tiny'"),
        (["--model", "no/such/folder"], 2, "the folder no/such/folder does not exist"),
        (["--temperature", "-1"], 2, "error: temperature is -1.0; it must be a number from 0"),
        (["--stop", ""], 2, "it must be a non-empty string"),
        (["--prompt", ""], 2, "error: the prompt is empty"),
        (["--prompt", 5000 * "a b "], 2, "shorten it"),
        (["--dtype", "float99"], 2, "'float32'"),
        (["--max-tokens", "many"], 2, "Invalid value"),
        (["--colour"], 2, "No such option"),
    ],
)
def test_errors_are_one_message(args, code, message, monkeypatch):
    if "--prompt" in args:
        monkeypatch.setattr(mj, "load", lambda *args, **options: tiny())
    else:
        args = [*args, "--prompt", "x"]
    result = run("generate", *args)
    assert (result.exit_code, result.stdout) == (code, "")
    assert message in " ".join(result.stderr.replace("│", "").split())
    assert isinstance(result.exception, SystemExit)


def test_a_broken_checkpoint_exits_with_1(tmp_path):
    (tmp_path / "config.json").write_text("{")
    result = run("generate", "--model", str(tmp_path), "--prompt", "x")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "config.json" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_traceback_on_request(monkeypatch):
    monkeypatch.setenv("MIMO_JAX_TRACEBACK", "1")
    result = run("generate", "--prompt", "x", "--temperature", "-1")
    assert isinstance(result.exception, ValueError)


def test_inspect_describes_a_good_checkpoint():
    result = run("inspect", "mimo-tiny")
    assert result.exit_code == 0, result.stderr
    assert "layers: fSSSFSSF" in result.stdout
    assert result.stdout.endswith("no problems found\n")


def test_inspect_as_json():
    fields = json.loads(run("inspect", "mimo-tiny", "--json").stdout)
    report = checkpoint.inspect(checkpoint.bundled()["mimo-tiny"])
    assert report.config is not None
    assert mj.MiMoConfig.from_dict(fields["config"]) == report.config
    assert fields["parameters"] == report.parameters
    assert fields["layout"]["qkv"] == "interleaved"
    assert fields["problems"] == []
    assert sum(group["count"] for group in fields["groups"]) == sum(g.count for g in report.groups)


def test_inspect_exits_with_1_when_there_are_problems(tmp_path):
    folder = shutil.copytree(checkpoint.bundled()["mimo-tiny"], tmp_path / "copy")
    (folder / "model-00002-of-00002.safetensors").unlink()
    result = run("inspect", str(folder))
    assert result.exit_code == 1
    assert "model-00002-of-00002.safetensors" in result.stdout
    as_json = run("inspect", str(folder), "--json")
    assert as_json.exit_code == 1
    assert json.loads(as_json.stdout)["problems"]


@pytest.mark.parametrize("name", ["mimo-tinny", "no/such", "./here"])
def test_inspect_of_what_is_not_there(name):
    result = run("inspect", name)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ")


# -- several devices ------------------------------------------------------------------------------


def test_generate_on_a_mesh_writes_what_one_device_writes(loaded):
    options = ("--prompt", PROMPT, "--max-tokens", "12", "--dtype", "float32", "--temperature", "0")
    command = [sys.executable, "-m", "mimo_jax", "generate", *options]
    four = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"
    flags = {"XLA_FLAGS": four, "JAX_PLATFORMS": "cpu"}
    meshed = subprocess.run(
        [*command, "--mesh", "expert=2,tensor=2"],
        capture_output=True,
        text=True,
        env=os.environ | flags,
    )
    assert meshed.returncode == 0, meshed.stderr
    expected = exact().generate(PROMPT, mj.SamplingParams(max_tokens=12, temperature=0.0))[0].text
    assert meshed.stdout == expected


def test_random_weights_read_bytes_and_print_ids():
    options = "--model tiny-transformers-test --layers 1 --random-weights 3 --max-tokens 5"
    result = run("generate", "--prompt", "!", *options.split())
    assert result.exit_code == 0, result.stderr
    ids = [int(t) for t in result.stdout.split()]
    assert len(ids) == 5 or "finish reason: stop" in result.stderr
    assert all(0 <= i < 99 for i in ids)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--mesh", "tensor"], "'tensor' is not AXIS=SIZE"),
        (["--mesh", "tensor=64"], "mesh tensor=64 needs 64 devices, but there are 8 (cpu)"),
        (["--mesh", "expert=3", "--rules", "throughput"], "expert has 32 indivisible parts"),
        (["--mesh", "tensor=2", "--rules", "fast"], "no rules are called 'fast'; there are"),
    ],
)
def test_meshes_that_cannot_be(args, message):
    result = run("generate", "--prompt", "x", *args)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr


def test_a_job_of_no_cluster_says_how_to_start_one():
    command = [sys.executable, "-m", "mimo_jax", "generate", "--prompt", "x", "--distributed"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "no cluster was found" in done.stderr
    assert "Traceback" not in done.stderr


def test_plan_says_whether_a_model_fits():
    options = ("--model", "MiMo-V2.5-Pro-FP4-DFlash", "--mesh", "tensor=4")
    fits = run("plan", *options, "--device", "h200")
    assert fits.exit_code == 0, fits.stderr
    assert "experts 123.71 1/4" in " ".join(fits.stdout.split())
    assert "fits: needs" in fits.stdout
    short = run("plan", *options, "--device", "h100")
    assert short.exit_code == 1
    assert "does not fit: needs" in short.stdout
    assert "try mesh tensor=8" in short.stdout


def test_plan_as_json_and_explained():
    options = "--model MiMo-V2-Flash --device h100 --mesh tensor=8 --layers 4"
    fields = json.loads(run("plan", *options.split(), "--json").stdout)
    assert fields["mesh"]["tensor"] == 8
    assert fields["fits"] is True
    explained = run("plan", *options.split(), "--explain").stdout
    assert "4 parts, not a multiple of 8; tensor to group, qkv_row" in explained


def test_plan_of_an_unknown_device():
    result = run("plan", "--device", "h300")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "h200" in result.stderr


def test_convert_writes_a_checkpoint_that_loads_like_any_other(tmp_path):
    out = tmp_path / "converted"
    result = run("convert", "mimo-tiny", str(out), "--mesh", "tensor=2")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"{out} is complete; load it by that name\n"
    lm = load(out)
    for got, expected in zip(*map(jax.tree.leaves, (lm.model, tiny().model)), strict=True):
        np.testing.assert_array_equal(got, expected)
    assert lm.config == tiny().config
    assert lm.encode(PROMPT) == tiny().encode(PROMPT)
    again = run("convert", "mimo-tiny", str(out))
    assert again.exit_code == 1
    assert "not empty; convert into a new folder" in again.stderr
