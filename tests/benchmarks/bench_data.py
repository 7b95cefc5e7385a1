"""Tokenizing against its engine, `tokenizers` and `datatrove`: `make bench-data`; prints Markdown tables.

The corpus is text that lies on this machine (Python sources, documentation, licences), the tokenizer a byte-level BPE
trained on it once; both are kept in the user's cache. Every side is a process of its own, run in turn, round after
round; the tables show medians. `--megabytes 20 --rounds 1` is a quick look.
"""

# ruff: noqa: T201
from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from machine import described

HERE, REPO = Path(__file__).parent, Path(__file__).parents[2]
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
SUFFIXES = (".py", ".pyi", ".md", ".rst", ".txt", ".html", ".h", ".c", ".hpp")
END, TURN = "<|endoftext|>", ("<|im_start|>", "<|im_end|>")
MISSED: list[str] = []
"""Goals that were missed: ratios, memory and fill, which do not hang on the machine; any makes the exit code 1."""
WARM_BYTES = 1 << 30
SLOW_MEGABYTES = 20
"""Text given to the sides that encode with `tokenizers`, whose speed does not depend on how much there is."""


# --- what is tokenized ------------------------------------------------------------------------------------------


def texts_of_this_machine() -> Iterator[str]:
    """Every different text file under Python's folders and the system's documentation, in a mixed but fixed order."""
    roots = {Path(sys.prefix), Path(sys.base_prefix), Path("/usr/share/doc"), Path("/usr/share/common-licenses")}
    found = [p for root in roots for p in root.rglob("*") if p.suffix in SUFFIXES or p.name.startswith("LICENSE")]
    seen: set[bytes] = set()
    for path in sorted(found, key=lambda p: hashlib.md5(p.name.encode() + str(p.parent.name).encode()).digest()):
        try:
            text = path.read_text(encoding="utf-8") if path.is_file() and not path.is_symlink() else ""
        except (OSError, UnicodeDecodeError):
            continue
        digest = hashlib.md5(text.encode()).digest()
        if text.strip() and digest not in seen:
            seen.add(digest)
            yield text


def write_corpus(path: Path, size: int) -> Path:
    """JSON lines with ``size`` bytes of text; the machine's text is repeated if there is too little."""
    if not path.exists():
        written, draft = 0, path.with_suffix(".draft")
        with draft.open("w", encoding="utf-8") as file:
            while written < size:
                for text in texts_of_this_machine():
                    file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                    written += len(text.encode())
                    if written >= size:
                        break
        draft.rename(path)
    return path


def write_samples(path: Path, corpus: Path, count: int) -> tuple[Path, Path]:
    """``count`` alpaca-like samples out of the corpus, as JSON lines and as parquet: lengths as Alpaca has them."""
    parquet_path = path.with_suffix(".parquet")
    if not parquet_path.exists():
        import numpy as np
        import pyarrow
        from pyarrow import parquet

        draw = np.random.default_rng(1)
        sizes = np.exp(draw.normal((4.0, 3.5, 5.2), (0.5, 0.8, 1.0), (count, 3))).astype(int) + 8
        sizes[draw.random(count) < 0.6, 1] = 0  # most have no input
        with corpus.open(encoding="utf-8") as file:
            text = "".join(json.loads(line)["text"] for line, _ in zip(file, range(9000), strict=False))
        starts = draw.integers(0, len(text) - sizes.max() - 1, (count, 3))
        columns = [[text[a : a + n] for a, n in zip(starts[:, i], sizes[:, i], strict=True)] for i in range(3)]
        table = pyarrow.table(dict(zip(("instruction", "input", "output"), columns, strict=True)))
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in table.to_pylist()))
        parquet.write_table(table, parquet_path)
    return path, parquet_path


def write_tokenizer(folder: Path, corpus: Path, entries: int = 100_000) -> Path:
    """A byte-level BPE tokenizer with Llama-3's pattern in a Hugging Face folder, trained by gigatoken."""
    if not (folder / "tokenizer_config.json").exists():
        import gigatoken
        from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

        vocabulary, merges = gigatoken.train_bpe(gigatoken.JsonlFileSource([corpus]), entries, [END])
        character = _byte_characters()

        def spelled(token: bytes) -> str:
            return END if token == END.encode() else "".join(character[byte] for byte in token)

        tokenizer = Tokenizer(
            models.BPE(
                vocab={spelled(token): number for number, token in vocabulary.items()},
                merges=[(spelled(left), spelled(right)) for left, right in merges],
            )
        )
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(PATTERN), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
        )
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens([END, *TURN])
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer.save(str(folder / "tokenizer.json"))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def _byte_characters() -> dict[int, str]:
    """GPT-2's spelling of bytes as characters."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(others)}


# --- the sides: each runs in a process of its own and prints one JSON object ------------------------------------


def side_raw(corpus: Path, tokenizer: Path) -> dict[str, float]:
    """gigatoken alone, on all cores, with the whole text in memory and nothing written."""
    import gigatoken

    texts = [json.loads(line)["text"].encode() for line in corpus.open("rb")]
    engine = gigatoken.Tokenizer(tokenizer / "tokenizer.json")
    import awkward

    array = awkward.Array(texts)
    array = awkward.with_parameter(array, "__array__", "bytestring")
    started, cpu = time.perf_counter(), time.process_time()
    tokens = len(engine.encode_batch(array).layout.content)
    return {"work": time.perf_counter() - started, "cpu": time.process_time() - cpu, "tokens": tokens}


def side_tokenizers(corpus: Path, tokenizer: Path) -> dict[str, float]:
    """`tokenizers` alone, on all cores, with the text in memory and nothing written."""
    from tokenizers import Tokenizer

    texts = [json.loads(line)["text"] for line in corpus.open("rb")]
    encoder = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    started, cpu, tokens = time.perf_counter(), time.process_time(), 0
    for at in range(0, len(texts), 256):
        tokens += sum(len(e) for e in encoder.encode_batch_fast(texts[at : at + 256], add_special_tokens=False))
    return {"work": time.perf_counter() - started, "cpu": time.process_time() - cpu, "tokens": tokens}


def side_datatrove(corpus: Path, tokenizer: Path) -> dict[str, float]:
    """datatrove's reader and DocumentTokenizer, written to its own format."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    with tempfile.TemporaryDirectory() as scratch:
        steps = [
            JsonlReader(str(corpus.parent), glob_pattern=corpus.name, compression=None),
            DocumentTokenizer(
                f"{scratch}/out",
                tokenizer_name_or_path=str(tokenizer / "tokenizer.json"),
                eos_token=END,
                shuffle_documents=False,
                save_filename="tokens",
            ),
        ]
        started, cpu = time.perf_counter(), time.process_time()
        stats = LocalPipelineExecutor(pipeline=steps, tasks=1, workers=1, logging_dir=f"{scratch}/logs").run()
        work, used = time.perf_counter() - started, time.process_time() - cpu
        tokens = stats.stats[1].stats["tokens"].total
    return {"work": work, "cpu": used, "tokens": tokens}


SIDES = {"raw": side_raw, "tokenizers": side_tokenizers, "datatrove": side_datatrove}


def run_side(name: str, corpus: Path, tokenizer: Path, python: str) -> dict[str, float]:
    """One side in a process of its own."""
    warmed()
    command = [python, __file__, "--side", name, "--corpus", str(corpus), "--tokenizer", str(tokenizer)]
    done, usage = _process(command)
    return {**json.loads(done.splitlines()[-1]), "rss": usage.ru_maxrss / 1e3}


def run_ours(files: Path, tokenizer: Path, **options: object) -> dict[str, float]:
    """Our job as a stage runs it: the worker's process, its events, its folder."""
    with tempfile.TemporaryDirectory(dir=files.parent) as scratch:
        events, out = Path(scratch) / "events.jsonl", Path(scratch) / "out"
        job = {
            "job": "tokenize", "config": options, "inputs": {"files": [str(files)], "tokenizer": str(tokenizer)},
            "out": str(out), "events": str(events),
        }  # fmt: skip
        (Path(scratch) / "job.json").write_text(json.dumps(job))
        out.mkdir()
        warmed()
        started = time.time()
        _, usage = _process([sys.executable, "-m", "megatron_ext.worker", f"{scratch}/job.json"])
        wall = time.time() - started
        told = [json.loads(line) for line in events.read_text().splitlines()]
        progress = [event for event in told if event["event"] == "progress"]
        result = next(event for event in told if event["event"] == "result")
        first = next(event for event in progress if event.get("tokens"))
        return {
            "work": wall,
            "cpu": usage.ru_utime + usage.ru_stime,
            "tokens": result["tokens"],
            "documents": result["documents"],
            "rss": usage.ru_maxrss / 1e3,
            "first": first["time"] - started,
            "exact": result["engine"] == "gigatoken",
        }


def warmed() -> None:
    """Warm memory, in a process of its own: a child's peak of memory begins with that of its parent."""
    subprocess.run([sys.executable, "-c", f"from machine import warm; warm({WARM_BYTES})"], cwd=HERE, check=True)


def _process(command: list[str]) -> tuple[str, resource.struct_rusage]:
    with tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, cwd=REPO, stdout=said, stderr=errors)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        errors.seek(0)
        if process.returncode:
            raise RuntimeError(f"{command} ended with {process.returncode}: {errors.read().decode()[-2000:]}")
        return said.read().decode(), usage


# --- the tables -------------------------------------------------------------------------------------------------


def goal(what: str, found: float, least: float = 0.0, most: float = float("inf")) -> None:
    """Note a goal that was missed."""
    if not least <= found <= most:
        MISSED.append(f"{what}: {found:.4g}, the goal is {f'at least {least:g}' if least else f'at most {most:g}'}")


def medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    """The median of each figure."""
    return {name: statistics.median(float(each[name]) for each in rounds) for name in rounds[0]}


def bench_text(corpus: Path, slow: Path, tokenizer: Path, rounds: int, peer: str | None) -> None:
    """Text to idxmap, all sides in turn.

    ``more`` is the rate of additional text: the bytes that ``corpus`` has more than ``slow`` by the seconds that it
    takes more, so that start and loading are in neither side; ``thrift`` likewise by CPU seconds. ``tokenizers`` and
    datatrove, whose figures are without their start, get ``slow`` alone.
    """
    sides = {
        "gigatoken, in memory": lambda file: run_side("raw", file, tokenizer, sys.executable),
        "`mflow tokenize`, text to idxmap": lambda file: run_ours(file, tokenizer, format="text", append_eod=True),
        "`tokenizers.encode_batch_fast`, in memory": lambda file: run_side(
            "tokenizers", file, tokenizer, sys.executable
        ),
    }
    if peer:
        sides["`datatrove` DocumentTokenizer"] = lambda file: run_side("datatrove", file, tokenizer, peer)
    else:
        print("datatrove is not installed (pip install -e '.[bench]'): its row is left out\n")
    run_ours(slow, tokenizer, format="text")  # proves the engine once, which is kept
    found: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    few, many = (path.stat().st_size / 1e6 for path in (slow, corpus))
    for _ in range(rounds):
        for number, (name, side) in enumerate(sides.items()):
            small = side(slow)
            figures = {**small, "more": few / small["work"], "thrift": few / small["cpu"]}
            if number < 2:
                large = side(corpus)
                figures = {**large, "rate": many / large["work"], "whole_thrift": many / large["cpu"]}
                figures["more"] = (many - few) / (large["work"] - small["work"])
                figures["thrift"] = (many - few) / (large["cpu"] - small["cpu"])
            found[name].append(figures)
    middle = {name: medians(each) for name, each in found.items()}
    print("| text | MB/s | MB a CPU-second | both, start included | peak RSS MB | first tokens s |")
    print("|---|---|---|---|---|---|")
    for name, m in middle.items():
        whole = f"{m['rate']:.1f}, {m['whole_thrift']:.1f}" if "first" in m else ""
        first = f"{m['first']:.2f}" if "first" in m else ""
        print(f"| {name} | {m['more']:.1f} | {m['thrift']:.1f} | {whole} | {m['rss']:.0f} | {first} |")
    _, ours, reference = list(middle.values())[:3]
    ratio = statistics.median(o["more"] / r["more"] for r, o in zip(*list(found.values())[:2], strict=True))
    print(
        f"\nwork at {ratio:.2f}x of the engine's rate in memory (goal 0.9), "
        f"{ours['thrift'] / reference['thrift']:.0f}x less CPU than `tokenizers` (goal 20), "
        f"{ours['whole_thrift'] / reference['thrift']:.0f}x with our start and without that of `tokenizers`\n"
    )
    goal("rate over the engine's in memory", ratio, least=0.9)
    goal("text a CPU-second over that of tokenizers", ours["thrift"] / reference["thrift"], least=20)
    goal("seconds to the first tokens", ours["first"], most=1.5)
    goal("peak RSS in MB", ours["rss"], most=650)


def bench_chat(home: Path, corpus: Path, samples: int, tokenizer: Path, rounds: int) -> None:
    """Conversations to idxmap and mask: a named template, two without marks, parquet. Rates as in ``bench_text``.

    A template that hands contents on is rendered once for each shape of a conversation; one that looks into them, for
    every conversation.
    """
    templates = {}
    for name, content in (("plain", "m['content']"), ("looking", "m['content'][:99999]")):
        templates[name] = home / f"{name}.jinja"
        templates[name].write_text(
            "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ " + content + " }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        )
    few = write_samples(home / f"samples{samples // 4}.jsonl", corpus, samples // 4)
    many = write_samples(home / f"samples{samples}.jsonl", corpus, samples)
    sides = {
        "jsonl, template `chatml`": (0, "chatml"),
        "jsonl, a Jinja file without marks": (0, str(templates["plain"])),
        "jsonl, a Jinja file that looks into contents": (0, str(templates["looking"])),
        "parquet, template `chatml`": (1, "chatml"),
    }
    found: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, (kind, template) in sides.items():
            small, large = (
                run_ours(files[kind], tokenizer, format="alpaca", chat_template=template) for files in (few, many)
            )
            more = (large["documents"] - small["documents"]) / (large["work"] - small["work"])
            found[name].append({**large, "more": more})
    print("| chat | samples | additional samples/s | samples/s, start included | CPU s | peak RSS MB |")
    print("|---|---|---|---|---|---|")
    for name, each in found.items():
        m = medians(each)
        whole = m["documents"] / m["work"]
        goal(f"samples/s, {name}", m["more"], least=10_000)
        print(f"| {name} | {m['documents']:,.0f} | {m['more']:,.0f} | {whole:,.0f} | {m['cpu']:.1f} | {m['rss']:.0f} |")
    rates = {name: statistics.median(one["more"] for one in each) for name, each in found.items()}
    ratio = rates["parquet, template `chatml`"] / rates["jsonl, template `chatml`"]
    goal("samples/s of parquet over those of jsonl", ratio, least=0.95)
    print(f"\n(goal 10,000 samples/s on 2 cores; parquet at {ratio:.2f}x of jsonl, goal 1, within 5 % of noise)\n")


def bench_packing() -> None:
    """Best-fit decreasing over a million lengths like Alpaca's, aligned as by default and not at all."""
    import numpy as np

    from megatron_ext.config import TrainConfig
    from megatron_ext.data.packing import pack

    default = TrainConfig.model_fields["pack_alignment"].default
    lengths = np.clip(np.exp(np.random.default_rng(0).normal(4.6, 0.8, 1_000_000)), 8, 4096).astype(np.int64)
    print("| packing 1,000,000 lengths to 4096 | seconds (goal 5) | full (goal 99 %) | tokens |\n|---|---|---|---|")
    for alignment, said in ((default, "the default"), (1, "none")):
        started = time.perf_counter()
        packing = pack(lengths, 4096, 1, alignment)
        seconds = time.perf_counter() - started
        print(f"| alignment {alignment}, {said} | {seconds:.1f} | {packing.fill:.2%} | {packing.useful:.2%} |")
        goal(f"places taken at alignment {alignment}", packing.fill, least=0.99)
    print("\n(full: places that documents take, alignment included; tokens: places that hold a token)\n")


def main() -> None:
    """Build what is missing, run every side, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=140, help="text of the main corpus")
    parser.add_argument("--large", type=int, default=1000, help="text of a run for its memory alone; 0 for none")
    parser.add_argument("--samples", type=int, default=52_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer-python", help="a Python that has datatrove; default this one, if it has")
    parser.add_argument("--side", choices=SIDES)
    parser.add_argument("--corpus", type=Path)
    parser.add_argument("--tokenizer", type=Path)
    given = parser.parse_args()
    if given.side:
        print(json.dumps(SIDES[given.side](given.corpus, given.tokenizer)))
        return
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megatron-flows" / "bench"
    home.mkdir(parents=True, exist_ok=True)
    corpus = write_corpus(home / f"text{given.megabytes}.jsonl", given.megabytes * 1_000_000)
    slow = write_corpus(home / f"text{SLOW_MEGABYTES}.jsonl", SLOW_MEGABYTES * 1_000_000)
    tokenizer = write_tokenizer(home / "tokenizer", write_corpus(home / "text140.jsonl", 140_000_000))
    print(f"{described(home)}; {corpus.stat().st_size / 1e6:.0f} MB of JSON lines, medians of {given.rounds} rounds\n")
    peer = given.peer_python or (sys.executable if find_spec("datatrove") else None)
    bench_text(corpus, slow, tokenizer, given.rounds, peer)
    if given.large:
        large = write_corpus(home / f"text{given.large}.jsonl", given.large * 1_000_000)
        figures = run_ours(large, tokenizer, format="text", append_eod=True)
        rate = large.stat().st_size / 1e6 / figures["work"]
        print(f"{given.large} MB: peak RSS {figures['rss']:.0f} MB (goal 650), {rate:.0f} MB/s\n")
        goal(f"peak RSS in MB at {given.large} MB", figures["rss"], most=650)
    bench_chat(home, corpus, given.samples, tokenizer, given.rounds)
    bench_packing()
    shutil.rmtree(home / "scratch", ignore_errors=True)
    if MISSED:
        sys.exit("goals missed:\n" + "\n".join(f"- {one}" for one in MISSED))


if __name__ == "__main__":
    main()
