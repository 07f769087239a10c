"""Sampling: probabilities, seeds, neighbours, ends. What is drawn follows the model's distribution exactly.

pytest tests/test_sample.py
"""

from __future__ import annotations

import json
import math
import wave
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from mbtrain import cli, config, render, sample, session
from mbtrain.checkpoint import Progress
from mbtrain.errors import ConfigError
from mbtrain.media import audio, image
from mbtrain.model import Model, build
from mbtrain.request import Asked, asked_in
from mbtrain.sample import Sampling, as_text, choose, generate, probabilities
from mbtrain.session import Session
from mbtrain.vocab import BOUNDARY
from tests import launch, tiny
from tests.model.test_megabyte import randomised
from tests.test_checkpoint import made_run


def model_of(stages: int = 2, seq_len: int = 32, **data: Any) -> Model:
    """A float64 model with large random weights, so that its distributions are uneven."""
    return randomised(tiny.make(stages, seq_len=seq_len, data=data))


def without_boundary(model: Model) -> Model:
    """The same model, never predicting an end."""
    whole = model.logits

    def logits(x: Tensor) -> Tensor:
        out = whole(x).clone()
        out[..., BOUNDARY] = -torch.inf
        return out

    model.logits = logits  # type: ignore[method-assign]
    return model


# ---- one distribution ----------------------------------------------------------------------------------------------

logits_rows = st.lists(st.integers(-400, 400), min_size=2, max_size=20, unique=True).map(
    lambda row: torch.tensor([row], dtype=torch.float64) / 100
)


@settings(deadline=None)
@given(logits=logits_rows, temperature=st.floats(0.05, 5))
def test_without_cuts_it_is_the_softmax_at_that_temperature(logits: Tensor, temperature: float) -> None:
    p = probabilities(logits, Sampling(temperature))
    torch.testing.assert_close(p.double(), (logits / temperature).softmax(-1), atol=1e-5, rtol=1e-4)


@settings(deadline=None)
@given(logits=logits_rows, k=st.integers(1, 25))
def test_top_k_keeps_the_k_likeliest_in_their_ratios(logits: Tensor, k: int) -> None:
    p = probabilities(logits, Sampling(top_k=k))[0]
    kept = p > 0
    assert int(kept.sum()) == min(k, len(p))
    assert logits[0][kept].min() >= logits[0].topk(min(k, len(p))).values[-1]
    assert float(p.sum()) == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(p[kept].double(), logits[0][kept].softmax(-1), atol=1e-5, rtol=1e-4)


@settings(deadline=None)
@given(logits=logits_rows, top_p=st.floats(0.01, 1))
def test_top_p_keeps_the_smallest_set_that_reaches_p(logits: Tensor, top_p: float) -> None:
    whole = logits.float().softmax(-1)[0]
    p = probabilities(logits, Sampling(top_p=top_p))[0]
    kept = p > 0
    assert kept.any()
    assert float(whole[kept].sum()) >= min(top_p, 1) - 1e-5
    assert float(whole[kept].sum() - whole[kept].min()) < top_p + 1e-5, "without the least likely it does not reach"
    assert not kept.all() or top_p > 0.01
    if not kept.all():
        assert whole[kept].min() >= whole[~kept].max()
    assert float(p.sum()) == pytest.approx(1, abs=1e-5)


def test_top_k_is_cut_before_top_p() -> None:
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    p = probabilities(logits, Sampling(top_k=2, top_p=0.5))  # of the two left, 4/7 reaches 0.5 alone
    torch.testing.assert_close(p, torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
    torch.testing.assert_close(
        probabilities(logits, Sampling(top_k=2, top_p=0.6)), torch.tensor([[4 / 7, 3 / 7, 0.0, 0.0]])
    )


@settings(deadline=None)
@given(logits=logits_rows, u=st.floats(0.001, 1, exclude_max=True))
def test_temperature_0_and_its_limit_take_the_likeliest(logits: Tensor, u: float) -> None:
    likeliest = logits.argmax(-1)
    point = torch.tensor([[u]], dtype=torch.float64)
    assert choose(logits, point, Sampling(0.0)) == likeliest
    assert choose(logits, point, Sampling(1e-4)) == likeliest
    assert choose(logits, point, Sampling(top_k=1)) == likeliest
    assert choose(logits, point, Sampling(top_p=1e-9)) == likeliest


@settings(deadline=None)
@given(u=st.sampled_from([0.0, 1e-300, 0.5, 1 - 2**-53]), where=st.integers(0, 6))
def test_what_is_impossible_is_never_chosen(u: float, where: int) -> None:
    """At both ends of the line as well."""
    logits = torch.full((1, 7), -torch.inf)
    logits[0, where] = 3.0
    assert choose(logits, torch.tensor([[u]], dtype=torch.float64), Sampling()).tolist() == [where]


@pytest.mark.parametrize("how", [Sampling(), Sampling(0.7), Sampling(top_k=5), Sampling(top_p=0.8)])
def test_choices_follow_the_probabilities(how: Sampling) -> None:
    """Chi-square of 200,000 choices with fixed seed against softmax; bound at about p = 1e-6."""
    n = 200_000
    torch.manual_seed(1)
    logits = torch.randn(1, 12) * 1.5
    uniform = torch.from_numpy(np.random.Generator(np.random.Philox(key=[5, 0])).random((n, 1)))
    counts = torch.bincount(choose(logits.expand(n, -1), uniform, how), minlength=12).double()
    expected = probabilities(logits, how)[0].double() * n
    possible = expected > 0
    assert counts[~possible].sum() == 0
    freedom = int(possible.sum()) - 1
    assert freedom >= 4
    statistic = float(((counts - expected)[possible] ** 2 / expected[possible]).sum())
    assert statistic < freedom + 5 * math.sqrt(2 * freedom) + 12


# ---- whole continuations -------------------------------------------------------------------------------------------


def test_a_seed_gives_the_same_bytes_and_another_seed_others() -> None:
    model = without_boundary(model_of())
    first = generate(model, [b"abc"], 24, Sampling(seed=1))
    assert first == generate(model, [b"abc"], 24, Sampling(seed=1))
    assert first != generate(model, [b"abc"], 24, Sampling(seed=2))
    assert len(first[0]) == 24
    rows = generate(model, [b"abc", b"abc"], 24, Sampling(seed=1))
    assert rows[0] == first[0]
    assert rows[0] != rows[1], "each row has numbers of its own"


def test_the_callers_random_state_is_neither_used_nor_moved() -> None:
    model = without_boundary(model_of())
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = generate(model, [b"abc"], 9, Sampling())
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    assert first == generate(model, [b"abc"], 9, Sampling())


def test_greedy_is_the_argmax_of_the_full_forward() -> None:
    """Byte by byte without any cache."""
    model = model_of(3)
    ids = [BOUNDARY, *b"ab"]
    expected = []
    with torch.no_grad():
        while len(expected) < 20:
            byte = int(model(torch.tensor([[*ids, 0]]))[0, -1].argmax())
            if byte == BOUNDARY:
                break
            expected.append(byte)
            ids.append(byte)
    assert len(expected) >= 1
    assert generate(model, [b"ab"], len(expected), Sampling(0.0)) == [bytes(expected)]


@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("boundary", [True, False])
def test_a_row_does_not_depend_on_its_neighbours(stages: int, boundary: bool) -> None:
    """Ragged prompts in one batch give the bytes of each alone; a row's numbers go with its place."""
    model = model_of(stages, boundary=boundary)
    prompts = [b"", b"a", b"hello", b"\0\xff\0", b"0123456789"]
    how = Sampling(seed=3)
    together = generate(model, prompts, 12, how)
    greedy = generate(model, prompts, 12, Sampling(0.0))
    for i, prompt in enumerate(prompts):
        others = [b"zz" * (i + 1)] * i
        assert generate(model, [*others, prompt], 12, how)[i] == together[i]
        assert generate(model, [prompt], 12, Sampling(0.0)) == [greedy[i]]
    assert any(together)


def test_a_prompt_longer_than_a_row_does_not_depend_on_its_neighbours() -> None:
    """Greedy; 41 and 75 bytes at seq_len 32."""
    model = without_boundary(model_of())
    prompts = [bytes(range(41)), bytes(range(75))]
    together = generate(model, prompts, 12, Sampling(0.0))
    assert together == [generate(model, [prompt], 12, Sampling(0.0))[0] for prompt in prompts]


@pytest.mark.parametrize("length", [0, 3, 4, 30, 31, 32, 33, 100])
def test_prompts_of_any_length_are_continued_past_the_end_of_a_row(length: int) -> None:
    model = without_boundary(model_of())
    prompt = bytes(i % 256 for i in range(length))
    out = generate(model, [prompt], 70, Sampling())
    assert len(out[0]) == 70


@pytest.mark.parametrize("seq_len", [4, 8])
def test_a_row_as_short_as_a_patch_or_two(seq_len: int) -> None:
    assert len(generate(without_boundary(model_of(seq_len=seq_len)), [b"abc"], 20, Sampling())[0]) == 20


def test_a_row_ends_at_the_boundary_alone() -> None:
    """The boundary is no byte of the row; the other rows go on; none has more than n bytes."""
    model = model_of()
    whole = model.logits
    calls = 0

    def ending(x: Tensor) -> Tensor:
        """Row 0 ends as its fourth byte, row 1 at once, row 2 never."""
        nonlocal calls
        calls += 1
        out = whole(x).clone()
        out[..., BOUNDARY] = -torch.inf
        if calls == 4:
            out[0, BOUNDARY] = torch.inf
        if calls == 1:
            out[1, BOUNDARY] = torch.inf
        return torch.where(out == torch.inf, torch.full_like(out, 1e6), out)

    model.logits = ending  # type: ignore[method-assign]
    rows = generate(model, [b"ab", b"cd", b"ef"], 9, Sampling())
    assert [len(row) for row in rows] == [3, 0, 9]
    assert calls == 9, "and nothing is computed when all are done"


@settings(max_examples=15, deadline=None)
@given(prompts=st.lists(st.binary(max_size=20), max_size=4), n=st.integers(0, 9), seed=st.integers(0, 2**63 - 1))
def test_never_more_than_n_bytes_and_never_fewer_rows(prompts: list[bytes], n: int, seed: int) -> None:
    rows = generate(SHARED, prompts, n, Sampling(seed=seed))
    assert len(rows) == len(prompts)
    assert all(len(row) <= n for row in rows)


SHARED = model_of(1)


def test_the_models_mode_is_given_back() -> None:
    """Dropout is off while bytes are drawn, and on again in a training that was interrupted for it."""
    model = randomised(tiny.make(2, "paper"))
    model.train()
    first = generate(model, [b"abc"], 8, Sampling())
    assert model.training
    model.eval()
    assert generate(model, [b"abc"], 8, Sampling()) == first
    assert not model.training


# ---- files and text ------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.binary(max_size=40))
def test_text_for_people_drops_nothing(content: bytes) -> None:
    """Every byte is there: as UTF-8, or as backslash x and two digits."""
    shown = as_text(content)
    rest = content
    for piece in split_as_text(shown, content):
        assert rest.startswith(piece)
        rest = rest[len(piece) :]
    assert rest == b""


def split_as_text(shown: str, content: bytes) -> list[bytes]:
    """The bytes that stand for each character or escape of what is shown; follows content where both could be meant."""
    pieces: list[bytes] = []
    at = i = 0
    while i < len(shown):
        escape = shown[i : i + 4]
        if escape.startswith("\\x") and not content[at:].startswith(b"\\x"):
            piece, i = bytes([int(escape[2:], 16)]), i + 4
        else:
            piece, i = shown[i].encode(), i + 1
        pieces.append(piece)
        at += len(piece)
    return pieces


def test_the_file_holds_prompt_and_continuation_as_raw_bytes(tmp_path: Path) -> None:
    """Also a prompt that is no UTF-8; by default under RUN/samples, with step and seed in its name."""
    made_run(tmp_path / "run", tiny.make(2))
    prompt = b"\xff\xfe\0def "
    asked = Asked(prompt, n_bytes=20, count=1)
    written = sample.sample_run(tmp_path / "run", asked, Sampling(seed=5))
    assert written.paths == [tmp_path / "run" / "samples" / "step_0000000004_seed_5.txt"]
    assert written.paths[0].read_bytes() == prompt + written.continuations[0]
    assert written.plan.prompt == prompt
    assert written.bytes_per_s > 0
    there = sample.sample_run(tmp_path / "run", asked, Sampling(seed=5), tmp_path / "a" / "b.bin", tmp_path / "raw")
    assert there.paths == [tmp_path / "a" / "b.bin"]
    assert there.paths[0].read_bytes() == prompt + written.continuations[0] == (tmp_path / "raw").read_bytes()


def test_sample_json_has_the_contracts_keys(tmp_path: Path) -> None:
    made_run(tmp_path / "run", tiny.make(2))
    (tmp_path / "prompt").write_bytes(b"\xff\0")
    options = [f"--prompt-file={tmp_path / 'prompt'}", "--bytes=9", "--temperature=1", "--top-k=40", "--top-p=0.9"]
    ended = launch.mbtrain(["sample", str(tmp_path / "run"), *options, f"--out={tmp_path / 'out'}", "--json"])
    figures = launch.last_json(ended.stdout)
    assert set(figures) == {"path", "bytes", "bytes_per_s"}
    content = (tmp_path / "out").read_bytes()
    assert content.startswith(b"\xff\0")
    assert figures["bytes"] == len(content) - 2 <= 9
    assert figures["path"] == str(tmp_path / "out")
    assert ended.stdout.startswith("\\xff\0")


# ---- modalities ----------------------------------------------------------------------------------------------------

IMAGE = {"name": "pictures", "modality": "image", "shape": [8, 8, 3], "prep": {"size": 8, "filter": "box"}}
AUDIO = {"name": "speech", "modality": "audio", "sample_rate": 100, "encoding": "pcm16"}
TEXT = {"name": "books", "modality": "text", "shape": None, "prep": {}}
# A patch is 2 x 2 pixels.
STAGES = [{"patch_size": 12, "d_model": 24, "n_layers": 1, "n_heads": 2}, tiny.STAGES[1][0]]


def run_of(folder: Path, *sources: dict[str, Any], scan: str = "patch", boundary: bool = False) -> Path:
    """A run of these sources with rows of an 8 x 8 picture."""
    data = {"boundary": boundary, "scan": scan}
    made_run(folder, tiny.make(2, seq_len=192, model={"stages": STAGES}, data=data))
    (folder / "environment.json").write_text(json.dumps({"host": "here", "data": list(sources)}))
    return folder


def sampled(capsys: pytest.CaptureFixture[str], run: Path, **options: str) -> dict[str, Any]:
    """The verb's figures, and what it said on stderr as "said"."""
    capsys.readouterr()
    cli.sample(str(run), json="true", temperature="1", **options)
    captured = capsys.readouterr()
    return {**launch.last_json(captured.out), "said": captured.err, "shown": captured.out.splitlines()[:-1]}


def pixels(path: str | Path) -> np.ndarray:
    with Image.open(path) as picture:
        assert (picture.format, picture.mode) == ("PNG", "RGB")
        return np.array(picture)


def png(path: Path, height: int, width: int, seed: int = 0) -> np.ndarray:
    """Write a picture of noise; returns its pixels."""
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(noise).save(path, "PNG")
    return noise


@pytest.mark.parametrize("scan", ["patch", "raster"])
def test_a_picture_is_the_models_bytes_put_where_they_belong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], scan: str
) -> None:
    run = run_of(tmp_path / "run", IMAGE, scan=scan)
    figures = sampled(capsys, run, raw=str(tmp_path / "raw"))
    assert figures["path"] == str(run / "samples" / "step_0000000004_seed_0.png")
    assert figures["bytes"] == 192
    assert figures["shown"] == [], "a picture is no text for a terminal"
    assert "grey" not in figures["said"]
    row = np.frombuffer((tmp_path / "raw").read_bytes(), np.uint8)
    picture = pixels(figures["path"])
    assert len(np.unique(row)) > 50
    if scan == "raster":
        assert (picture == row.reshape(8, 8, 3)).all()
        return
    for i, block in enumerate(row.reshape(16, 2, 2, 3)):  # blocks of 2 x 2, four beside each other
        y, x = 2 * (i // 4), 2 * (i % 4)
        assert (picture[y : y + 2, x : x + 2] == block).all()


def test_half_a_picture_is_completed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The upper half is the file's, as data prep would make it; the grid shows the file, what was given, what came."""
    run = run_of(tmp_path / "run", IMAGE)
    noise = png(tmp_path / "cat.png", 16, 24)
    # The centre square, each 2 x 2 pixels averaged: data prep's box filter to 8 x 8.
    whole = image.decode((tmp_path / "cat.png").read_bytes(), 8, filter="box")
    assert np.abs(noise[:, 4:20].reshape(8, 2, 8, 2, 3).mean((1, 3)) - whole).max() <= 1
    one = sampled(capsys, run, prompt_file=str(tmp_path / "cat.png"), out=str(tmp_path / "one.png"))
    assert one["bytes"] == 96
    completed = pixels(tmp_path / "one.png")
    assert (completed[:4] == whole[:4]).all()
    assert (completed[4:] != whole[4:]).any()

    given = {"prompt_file": str(tmp_path / "cat.png"), "prompt_bytes": "25%", "out": str(tmp_path / "grid.png")}
    several = sampled(capsys, run, **given, count="3")
    assert several["bytes"] == 3 * 144
    assert "paths" not in several
    grid = pixels(tmp_path / "grid.png")
    cells = [grid[y : y + 8, x : x + 8] for y in (0, 10) for x in (0, 10, 20)][:5]
    assert grid.shape == (18, 28, 3)
    assert (cells[0] == whole).all()
    assert (cells[1][:2] == whole[:2]).all()
    assert (cells[1][2:] == render.GREY).all()
    assert all((cell[:2] == whole[:2]).all() for cell in cells[2:])
    assert len({cell.tobytes() for cell in cells}) == 5, "each row draws numbers of its own"


def test_bytes_that_are_not_made_are_grey_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = sampled(capsys, run_of(tmp_path / "run", IMAGE, scan="raster"), bytes="24")
    assert "grey: 168 bytes of 192 are missing" in figures["said"]
    picture = pixels(figures["path"])
    assert (picture[1:] == render.GREY).all()
    assert (picture[0] != render.GREY).any()


@pytest.mark.parametrize(("sources", "boundary"), [([IMAGE], False), ([TEXT, IMAGE, AUDIO], True)])
def test_a_batchs_pictures_are_those_of_smaller_batches(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], sources: list[dict[str, Any]], boundary: bool
) -> None:
    """Also in a run with text, whose boundary is no byte of a picture: each has all of its bytes."""
    run = run_of(tmp_path / "run", *sources, boundary=boundary)
    rows = []
    for count in ("1", "4"):
        raw = tmp_path / count
        figures = sampled(capsys, run, source="pictures", count=count, raw=str(raw))
        assert figures["bytes"] == 192 * int(count)
        rows.append(np.frombuffer(raw.read_bytes(), np.uint8).reshape(int(count), 192))
    assert (rows[0][0] == rows[1][0]).all()
    assert pixels(figures["path"]).shape == (18, 18, 3)


def wav(path: str | Path) -> tuple[int, np.ndarray]:
    """Rate in Hz and frames of a mono 16-bit file."""
    with wave.open(str(path)) as file:
        assert (file.getnchannels(), file.getsampwidth()) == (1, 2)
        return file.getframerate(), np.frombuffer(file.readframes(file.getnframes()), "<i2")


def tone(path: Path, rate: int, frames: int) -> np.ndarray:
    """Write a mono WAV; returns its frames."""
    pcm = (9000 * np.sin(np.arange(frames) / 3)).astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, rate, 0, "NONE", ""))
        file.writeframes(pcm.tobytes())
    return pcm


def test_a_second_of_sound_is_continued(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_of(tmp_path / "run", {**AUDIO, "sample_rate": 8000})
    pcm = tone(tmp_path / "a.wav", 8000, 9000)
    options = {"prompt_file": str(tmp_path / "a.wav"), "bytes": "41", "out": str(tmp_path / "out.wav")}
    assert sampled(capsys, run, **options)["bytes"] == 41
    rate, frames = wav(tmp_path / "out.wav")
    assert rate == 8000
    assert len(frames) == 8000 + 20, "the first second and the whole frames of what was made"
    assert (frames[:8000] == pcm[:8000]).all()
    sampled(capsys, run, **options, prompt_bytes="33")  # half a frame is not given
    assert len(wav(tmp_path / "out.wav")[1]) == (32 + 41) // 2


def test_several_sounds_are_numbered_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_of(tmp_path / "run", AUDIO)
    figures = sampled(capsys, run, count="11", out=str(tmp_path / "a.wav"), raw=str(tmp_path / "raw"))
    assert figures["paths"] == [str(tmp_path / f"a_{i:02}.wav") for i in range(11)]
    assert figures["path"] == figures["paths"][0]
    rows = np.frombuffer((tmp_path / "raw").read_bytes(), "<i2").reshape(11, 200)  # 2 seconds at 100 Hz
    for row, path in zip(rows, figures["paths"], strict=True):
        rate, frames = wav(path)
        assert rate == 100
        assert (frames == row).all()


def test_mulaw_is_a_byte_a_frame(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_of(tmp_path / "run", {**AUDIO, "encoding": "mulaw8", "sample_rate": 8000})
    pcm = tone(tmp_path / "a.wav", 8000, 500)
    options = {"prompt_file": str(tmp_path / "a.wav"), "prompt_bytes": "101", "bytes": "9"}
    figures = sampled(capsys, run, **options, raw=str(tmp_path / "raw"))
    content = (tmp_path / "raw").read_bytes()
    frames = wav(figures["path"])[1]
    assert len(content) == len(frames) == 110
    assert content[:101] == audio.encode(pcm[:101], "mulaw8")
    assert (frames == audio.to_pcm(content, "mulaw8")).all()


def test_several_texts_are_numbered_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_of(tmp_path / "run", TEXT)
    figures = sampled(capsys, run, prompt="ab", count="3", bytes="5")
    assert [Path(path).name for path in figures["paths"]] == [f"step_0000000004_seed_0_{i}.txt" for i in range(3)]
    assert {Path(path).read_bytes()[:2] for path in figures["paths"]} == {b"ab"}
    assert len({Path(path).read_bytes() for path in figures["paths"]}) == 3
    assert figures["bytes"] == 15
    assert sum(line.startswith("--- ") for line in figures["shown"]) == 3


def test_a_text_prompt_goes_to_the_text_of_a_mixture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_of(tmp_path / "run", IMAGE, TEXT, boundary=True)
    assert sampled(capsys, run)["path"].endswith(".png"), "the first source"
    figures = sampled(capsys, run, prompt="ab", bytes="5")
    assert figures["path"].endswith(".txt")
    assert Path(figures["path"]).read_bytes().startswith(b"ab")


def test_pictures_of_unknown_shape(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The largest square of whole patches that a row holds, said; or --shape; or the prompt file's own."""
    native = {**IMAGE, "shape": None, "prep": {"size": None}}
    run = run_of(tmp_path / "run", native)
    figures = sampled(capsys, run)
    assert "taken for 8x8 pixels; --shape=HxW" in figures["said"]
    assert pixels(figures["path"]).shape == (8, 8, 3)
    assert pixels(sampled(capsys, run, shape="4x16")["path"]).shape == (4, 16, 3)
    noise = png(tmp_path / "wide.png", 6, 10)
    figures = sampled(capsys, run, prompt_file=str(tmp_path / "wide.png"), prompt_bytes="60")
    picture = pixels(figures["path"])
    assert picture.shape == (6, 10, 3)
    assert (picture[:2] == noise[:2]).all()
    assert "taken for" not in figures["said"]
    odd = run_of(tmp_path / "odd", native, scan="raster")
    assert render.square(render.Form(modality="image"), 200).shape == (8, 8)
    assert render.square(render.Form(modality="image", patch_sizes=(12, 1)), 3 * 49).shape == (6, 6)
    assert pixels(sampled(capsys, odd, shape="1x5")["path"]).shape == (1, 5, 3)


@pytest.mark.parametrize(
    ("source", "options", "words"),
    [
        (IMAGE, {"prompt": "a"}, "--prompt: pictures is image; give --prompt-file"),
        (IMAGE, {"prompt_bytes": "9"}, "--prompt-bytes: is a part of a file; give --prompt-file as well"),
        (IMAGE, {"prompt_file": "F", "prompt_bytes": "193"}, "got '193', expected at most the file's 192 bytes"),
        (IMAGE, {"prompt_file": "F", "prompt_bytes": "101%"}, "got '101%', expected at most"),
        (IMAGE, {"prompt_file": "F", "prompt_bytes": "1/0%"}, "got '1/0%', expected at most"),
        (IMAGE, {"prompt_file": "F", "prompt_bytes": "-1"}, "got '-1', expected at most"),
        (IMAGE, {"prompt_file": "F", "prompt_bytes": "half"}, "or a share as in 50%"),
        (IMAGE, {"prompt_file": "F", "prompt_bytes": "100%"}, "--prompt-bytes: nothing is left of the picture"),
        (IMAGE, {"prompt_file": "F", "bytes": "97"}, "--bytes: got 97, expected at most 96, the rest of a picture"),
        (IMAGE, {"prompt_file": "BAD"}, "bad: cannot be decoded as image (not a JPEG"),
        (AUDIO, {"prompt_file": "BAD"}, "bad: cannot be decoded as audio ("),
        (TEXT, {"prompt_file": "BAD", "prompt_bytes": "8"}, "expected at most the file's 7 bytes"),
        (IMAGE, {"shape": "8x9"}, "--shape: got 8x9, expected 8x8 as pictures has"),
        (IMAGE, {"shape": "8by8"}, "--shape: got '8by8', expected HxW in pixels"),
        (TEXT, {"shape": "8x8"}, "--shape: got '8x8', expected nothing: books is text"),
        (IMAGE, {"source": "music"}, "--source: got 'music', expected one of pictures"),
        ({**IMAGE, "shape": None}, {"shape": "7x8"}, "no whole number of blocks of 2 x 2"),
        ({**IMAGE, "prep": {"size": None}}, {"prompt_file": "WIDE"}, "expected an image of 8x8 pixels as pictures has"),
        ({**IMAGE, "modality": "smell"}, {}, "expected text, image or audio, got 'smell'"),
    ],
)
def test_what_does_not_fit_the_run_is_one_line(
    tmp_path: Path, source: dict[str, Any], options: dict[str, str], words: str
) -> None:
    run = run_of(tmp_path / "run", source)
    png(tmp_path / "f.png", 8, 8)
    png(tmp_path / "wide.png", 8, 12)
    (tmp_path / "bad").write_bytes(b"nothing")
    files = {"F": "f.png", "BAD": "bad", "WIDE": "wide.png"}
    filled = {key: str(tmp_path / files[value]) if value in files else value for key, value in options.items()}
    with pytest.raises(ConfigError) as error:
        cli.sample(str(run), **filled)
    assert words in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    assert not (run / "samples").exists()


def test_a_file_for_a_run_of_several_modalities_needs_a_source(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", IMAGE, AUDIO)
    png(tmp_path / "f.png", 8, 8)
    with pytest.raises(ConfigError, match=r"the run has image, audio; say with --source which one it is"):
        cli.sample(str(run), prompt_file=str(tmp_path / "f.png"))
    cli.sample(str(run), prompt_file=str(tmp_path / "f.png"), source="pictures")


def test_boundaries_neither_begin_nor_end_what_has_none() -> None:
    model = model_of()
    whole = model.logits

    def ending(x: Tensor) -> Tensor:
        """Always the end."""
        out = whole(x).clone()
        out[..., BOUNDARY] = 1e6
        return out

    plain = generate(without_boundary(model_of()), [b"ab", b""], 40, Sampling(), ends=False)
    model.logits = ending  # type: ignore[method-assign]
    assert generate(model, [b"ab", b""], 40, Sampling()) == [b"", b""]
    assert generate(model, [b"ab", b""], 40, Sampling(), ends=False) == plain
    assert [len(row) for row in plain] == [40, 40]


def test_a_prompt_without_a_boundary_before_it_is_the_rows_beginning() -> None:
    """Greedy, against the full forward pass."""
    model = without_boundary(model_of())
    ids = list(b"ab")
    with torch.no_grad():
        while len(ids) < 20:
            ids.append(int(model(torch.tensor([[*ids, 0]]))[0, -1].argmax()))
    assert generate(model, [b"ab"], 18, Sampling(0.0), documents=False) == [bytes(ids[2:])]
    assert generate(model, [b"ab"], 18, Sampling(0.0)) != [bytes(ids[2:])]


# ---- while training ------------------------------------------------------------------------------------------------


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank, without a process group."""
    monkeypatch.setattr(session, "from_rank_0", lambda value: value)


def training(run: Path, **section: Any) -> Session:
    """As much of a session as sampling needs, of a run of text, pictures and sound."""
    run_of(run, TEXT, IMAGE, AUDIO, boundary=True)
    settings_ = config.load(run / "config.yaml")
    settings_ = settings_.model_copy(update={"sample": config.SampleConfig(**section)})
    weights = without_boundary(build(settings_)).state_dict()
    engine = SimpleNamespace(weights=lambda: weights.items())
    ranks = SimpleNamespace(rank=0, device=torch.device("cpu"))
    return cast(
        Session,
        SimpleNamespace(settings=settings_, run=run, ranks=ranks, engine=engine, clock=session.Clock(), unwritten=[]),
    )


@pytest.mark.usefixtures("alone")
def test_a_training_samples_each_of_its_modalities(tmp_path: Path) -> None:
    now = training(tmp_path / "run", prompt="ab", count=2, bytes=30)
    session.sample(now, Progress(step=7))
    names = sorted(path.name for path in (tmp_path / "run" / "samples").iterdir())
    step = "step_0000000007"
    assert names == [f"{step}.png", *(f"{step}_{i}.{ext}" for i in (0, 1) for ext in ("txt", "wav"))]
    assert (tmp_path / "run" / "samples" / f"{step}_1.txt").read_bytes().startswith(b"ab")
    assert pixels(tmp_path / "run" / "samples" / f"{step}.png").shape == (8, 18, 3)
    assert len(wav(tmp_path / "run" / "samples" / f"{step}_1.wav")[1]) == 15


@pytest.mark.usefixtures("alone")
def test_a_training_samples_by_default_a_text_four_pictures_and_a_sound(tmp_path: Path) -> None:
    session.sample(training(tmp_path / "run"), Progress(step=7))
    folder = tmp_path / "run" / "samples"
    assert sorted(path.suffix for path in folder.iterdir()) == [".png", ".txt", ".wav"]
    assert len((folder / "step_0000000007.txt").read_bytes()) <= 256
    assert pixels(folder / "step_0000000007.png").shape == (18, 18, 3)
    assert len(wav(folder / "step_0000000007.wav")[1]) == 200


@pytest.mark.usefixtures("alone")
def test_a_training_completes_a_picture_and_outlives_its_loss(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    noise = png(tmp_path / "f.png", 8, 8)
    file = str(tmp_path / "f.png")
    now = training(tmp_path / "run", source="pictures", prompt_file=file, prompt_bytes="50%", count=1)
    session.sample(now, Progress(step=7))
    assert (pixels(tmp_path / "run" / "samples" / "step_0000000007.png")[:4] == noise[:4]).all()
    (tmp_path / "f.png").unlink()
    session.sample(now, Progress(step=8))
    assert "step 8 · NOT sampled: sample.prompt_file=" in (tmp_path / "run" / "log.txt").read_text()
    assert len(list((tmp_path / "run" / "samples").iterdir())) == 1


@pytest.mark.parametrize("value", ["50%", "12.5%", 1000, "1000"])
def test_prompt_bytes_may_be_a_number_or_a_share(value: object) -> None:
    made = tiny.make(sample={"prompt_bytes": value})
    assert made.sample.prompt_bytes == str(value)
    assert asked_in(made.sample).prompt_bytes == str(value)


def test_a_configuration_has_one_prompt() -> None:
    with pytest.raises(ConfigError, match=r"sample\.prompt_file: got a\.png, expected nothing beside sample\.prompt"):
        tiny.make(sample={"prompt": "a", "prompt_file": "a.png"})


@pytest.mark.parametrize("value", ["half", "-1", "", True, "50 %", "1/2"])
def test_prompt_bytes_is_nothing_else(value: object) -> None:
    with pytest.raises(ConfigError, match=r"sample\.prompt_bytes"):
        tiny.make(sample={"prompt_bytes": value})
