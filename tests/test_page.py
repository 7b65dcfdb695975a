"""report.html and `python -m report`: what the page says, its size, hostile text, and the page in a real browser."""

import html.parser
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace
from urllib.parse import unquote
from xml.etree import ElementTree

import pytest
from helpers import ROOT, begin, rows, write_rows

from report import __main__ as script
from report import page
from report.figures import COLOURS
from report.files import RunFiles

HOSTILE = [
    "<script>window.hacked = 1</script>", "</script><script>window.hacked = 1</script>", "<!-- <script>",
    "\"'><img src=x onerror='window.hacked=1'>", "{{ 7 * 7 }} {% raw %}", "&lt;b&gt; &amp;", "\u202eright\u200f",
    "\x00\x1b[31m\x7f", "a lone \ud800 surrogate", "x" * 1_000_000, "]]>\u2028\u2029", "javascript:window.hacked=1", "",
]  # fmt: skip


def heldout_row(i: int, text: str, nll: float, error: float) -> dict:
    real = f"real response {i}"
    words = [[f" {word}" if n else word, -0.5] for n, word in enumerate(text.split(" "))]
    values = {"greedy_error": [error, 3.0], "nll": [nll, 3.0], "kl": [0.1, 1.0]}
    tokens = {"greedy": words, "real": [["real", -nll], [" response", 0.0], [f" {i}", 0.0]]}
    return {"prompt": f"prompt {i}", "references": [real], "values": values, "tokens": tokens, "greedy": text}


def write_run(folder, count: int, iterates: int, changed: int, steps: int = 20, **args):
    """Files of a run. Of `count` prompts the last `changed` get another, better response in every iterate."""
    folder.mkdir(parents=True)
    record = {"command": "spin", "args": {"iterations": iterates, "best": "nll", "lr": [1e-3]} | args}
    record |= {"digests": {"model": "12ab"}, "settings": "--lr 1e-3"}
    (folder / "run.json").write_text(json.dumps(record))

    metrics = []
    for t in range(iterates + 1):
        row = {"iterate": t, "sampled": 0.3 + 0.02 * t, "sampled_se": 0.01, "nll": 1 - 0.1 * t, "nll_se": 0.2}
        changes = {"sampled": [0.02 * t, 0.003], "nll": [-0.1 * t, 0.2]}
        counts = {"pairs": 9, "generated": 12, "identical": 3, "truncated": 0.0, "skipped": 0}
        metrics.append(row | {"entropy": 2} | ({"since_start": changes} | counts if t else {"frontier": []}))
        texts = [f"answer {t if i >= count - changed else 0} to {i}" for i in range(count)]
        errors = [9.0 - t * (i >= count - changed) for i in range(count)]
        lines = [heldout_row(i, texts[i], 2 - t * i / count, errors[i]) for i in range(count)]
        write_rows(folder / f"heldout-{t}.jsonl", lines)
        if t:
            lines = [{"iteration": t - 1, "step": i + 1, "loss": 0.7} for i in range(steps)]
            write_rows(folder / f"steps-{t - 1}.jsonl", lines)
    times = {"seconds": {"train": 2.0}, "memory": {"train": 2**20}, "machine": "m"}
    write_rows(folder / "metrics.jsonl", metrics)
    write_rows(folder / "times.jsonl", [{"iterate": t} | times for t in range(iterates + 1)])
    return folder


def page_of(*folders) -> str:
    return page.page([RunFiles(folder) for folder in folders])


class Reader(html.parser.HTMLParser):
    """Tags and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


# ---------------------------------------------------------------- what runs keep for it


def test_a_run_writes_its_page_after_every_iterate(whole):
    """The page has all iterates so far; times.jsonl has times and memory of each phase."""
    seen = json.loads((whole.parent / "pages.json").read_text())
    assert [("is not finished: 1 of 2" in text, "Only the start" in text) for text in seen] == [
        (False, True), (True, False), (False, False), (False, False),
    ]  # fmt: skip
    assert (whole / "report.html").read_text() == seen[-1]
    times = rows(whole / "times.jsonl")
    assert [row["iterate"] for row in times] == [0, 1, 2]
    assert set(times[1]["seconds"]) == set(times[1]["memory"]) == {"generate", "score", "train", "evaluate"}
    assert not {"report.html", "times.jsonl"} & set(re.findall(r"[\w.]+", (whole / "checksums").read_text()))


def test_a_page_that_cannot_be_written_is_a_warning(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(page, "RunFiles", lambda folder: 1 / 0)
    page.Page(tmp_path, lambda path, text: None).iterate([{"iterate": 0, "nll": 1.0, "nll_se": 0.1}], {}, "")
    assert "report.html: not written (ZeroDivisionError: division by zero)" in capsys.readouterr().err


def test_tokens_have_the_log_probabilities_that_a_pass_over_them_gives(whole, start, data, tmp_path):
    """The start's greedy and the real responses are compared by token; the pieces of the latter make up the text."""
    player, _, run = begin(start, data, tmp_path / "again", eval_limit=6)
    responses = player.respond([e.prompt_ids for e in run.work.heldout], 0, temperature=0.0)
    for row, example, (greedy, _) in zip(rows(whole / "heldout-0.jsonl"), run.work.heldout, responses, strict=True):
        for name, ids in (("greedy", greedy), ("real", example.real_ids)):
            (by_token,) = player.logps([(example.prompt_ids, ids)], by_token=True)
            pieces, logps = zip(*row["tokens"][name])
            expected, expected_logps = zip(*run.work.pieces(ids, by_token))
            assert pieces == expected and list(logps) == pytest.approx(expected_logps, abs=0.002)
        assert "".join(pieces).strip() == example.references[0]
        assert sum(logps) == pytest.approx(-row["values"]["nll"][0], abs=0.001 * len(logps))  # the real response's


def test_bytes_of_one_character_are_one_piece(start, data, tmp_path):
    """Bytes that make up no character are a piece after the fourth."""
    _, _, run = begin(start, data, tmp_path / "run")
    ids = run.work.tokenizer.encode("a\u00e9\U0001f600b").ids
    pieces = run.work.pieces([*ids, run.work.eos_token_id], [-0.5] * (len(ids) + 1))
    assert [text for text, _ in pieces] == ["a", "\u00e9", "\U0001f600", "b", ""]
    assert sum(logp for _, logp in pieces) == -0.5 * (len(ids) + 1)
    first = run.work.tokenizer.encode("\u00e9").ids[0]
    pieces = run.work.pieces([first] * 4 + run.work.tokenizer.encode("b").ids, [-0.5] * 5)
    assert [logp for _, logp in pieces] == [-2.0, -0.5] and pieces[1][0] == "b"


# ---------------------------------------------------------------- what the page says


def test_the_headline_tells_changes_from_noise(tmp_path):
    run = RunFiles(write_run(tmp_path / "run", 4, 2, 2))
    assert page.headline(run) == [
        "Changed beyond the noise: sampled accuracy from 30.0% to 34.0% (+4.0% \u00b1 0.3%, better).",
        "Not changed beyond the noise: NLL.",
        "No iterate is better by NLL.",
    ]
    few = [row | {"examples": 2} for row in run.rows]
    assert page.headline(SimpleNamespace(rows=few, args=run.args))[0] == (
        "Not changed beyond the noise: sampled accuracy, NLL."
    )
    run.rows[-1]["at_equal_entropy"] = {"temperature": 0.93, "sampled": [0.004, 0.003]}
    run.args |= {"best": "sampled", "iterations": 3}
    assert page.headline(run)[0] == "The run is not finished: 2 of 3 iterations."
    assert page.headline(run)[3:] == [
        "Against the start at temperature 0.93, which has the same entropy: sampled accuracy +0.4% \u00b1 0.3%.",
        "The best iterate by sampled accuracy is 2.",
    ]


def test_the_page_of_a_real_run(whole):
    """Every panel has its figure, every table its numbers; what a figure shows stays inside it."""
    text = (whole / "report.html").read_text()
    reader = Reader(text)
    shown = {attrs["aria-label"].partition(".")[0] for tag, attrs in reader.tags if tag == "svg"}
    assert {
        "greedy error", "NLL", "KL", "loss", "margin", "accuracy", "grad norm", "lr", "truncated", "real length",
    } <= shown  # fmt: skip
    ends = re.findall(r'<path class="grid" d="M[\d.]+ (-?[\d.]+)', text)
    assert ends and all(0 <= float(y) <= 190 for y in ends) and "nan" not in text
    assert re.search("spin .*--rank 4 --lora-dropout 0.1.*--mix-previous", reader.text)
    assert "--top-k" not in reader.text.partition("All options")[0]
    digest = json.loads((whole / "run.json").read_text())["digests"]["model"]
    assert digest in reader.text
    assert text.count('<tbody class="prompt"') == 6 and '<div class="controls" hidden>' in text, "without the script"
    scripts = [attrs for tag, attrs in reader.tags if tag == "script"]
    assert scripts == [{}] and not [tag for tag, _ in reader.tags if tag in ("link", "img", "iframe")]


def test_runs_without_some_files_still_get_a_page(whole, tmp_path):
    """A run may be unfinished, being written, or supervised."""
    older = shutil.copytree(whole, tmp_path / "older")
    for name in ("heldout-0.jsonl", "heldout-1.jsonl", "heldout-2.jsonl", "steps-1.jsonl", "times.jsonl"):
        (older / name).unlink()
    with open(older / "metrics.jsonl", "a") as file:
        file.write('{"iterate": 3, "nll')
    assert "Responses to held-out prompts" not in Reader(page_of(older)).text
    (older / "metrics.jsonl").unlink()
    assert "No iterate has been evaluated yet." in Reader(page_of(older)).text
    record = json.loads((older / "run.json").read_text())
    (older / "run.json").write_text(json.dumps(record | {"command": "sft"}))
    assert "sft --" in Reader(page_of(older)).text
    assert "2 runs" in Reader(page_of(whole, older)).text


def test_several_runs_are_compared(tmp_path):
    """The page has what differs, the last responses side by side if the prompts are the same, and a colour per run."""
    one = write_run(tmp_path / "one", 5, 2, 2, lr=[1e-3])
    two = write_run(tmp_path / "two", 5, 1, 4, lr=[5e-4])
    text = page_of(one, two)
    table = text[text.index("What differs") : text.index("All options")]
    assert "--lr" in table and "0.0005" in table and "--iterations" in table and "--best" not in table
    assert f'class="s1" fill="{COLOURS[1]}"' in text and "answer 2 to 4" in text and "answer 1 to 4" in text
    text = page_of(one, write_run(tmp_path / "other", 4, 1, 4))
    assert "Responses to held-out" not in text


def test_a_prompt_is_better_or_worse_by_the_edits_of_its_last_response():
    for text, error, kind in (("b", 0, "better"), ("b", 2, "worse"), ("b", 1, "changed"), ("a", 1, "same")):
        block = page.block(["start", "iterate 1"], [heldout_row(0, "a", 2.0, 1.0), heldout_row(0, text, 1.5, error)])
        assert (block["kind"], block["change"]) == (kind, 0.5)


def test_the_page_of_many_prompts_stays_small(tmp_path):
    """3 iterations of 500 steps have 2,000 held-out prompts: changed responses come first, and the page says so."""
    text = page_of(write_run(tmp_path / "run", 2000, 3, 200, steps=500))
    assert len(text.encode()) < 1_000_000
    kinds = [attrs["data-kind"] for tag, attrs in Reader(text).tags if tag == "tbody" and "data-kind" in attrs]
    assert kinds == ["better"] * 200 + ["same"] * 100
    words = " ".join(Reader(text).text.split())
    assert "300 of 2,000 held-out prompts" in words and "got better 200" in words


def hostile_run(folder):
    write_run(folder, len(HOSTILE), 1, 0, template="</script><script>window.hacked = 1</script>", model="<b>\ud800")
    for t, before in enumerate(("before ", "")):
        lines = rows(folder / f"heldout-{t}.jsonl")
        for row, text in zip(lines, HOSTILE):
            tokens = {"greedy": [[before + text, -1.0]], "real": [[text, -1.0]]}
            row |= {"prompt": text, "references": [text], "greedy": before + text, "tokens": tokens}
        write_rows(folder / f"heldout-{t}.jsonl", lines)
    return folder


def test_hostile_text_is_text(tmp_path):
    """Data, responses and options are hostile: the page has the tags of a harmless one, and can be written as UTF-8."""
    text = page_of(hostile_run(tmp_path / "<img src=x onerror=hacked>"))
    tags = Reader(text).tags
    assert [tag for tag, _ in tags if tag in ("script", "img", "b") or tag.startswith("!")].count("script") == 1
    assert not [tag for tag, attrs in tags if tag == "img" or any(name.startswith("on") for name in attrs)]
    shown = Reader(text).text
    for hostile in HOSTILE[:7]:
        assert hostile in shown
    assert "\u2400\u241b[31m\u2421" in shown and "[... 998,000 more characters]" in shown
    assert len(text.encode()) < 1_000_000 and "\x00" not in text


def test_tokens_are_encoded_as_lengths_and_quarters_of_a_nat():
    pieces = [["ab", -0.25], [" c", -100.0], ["d" * 40, 0.0], ["", -1.0]]
    assert page.encoded(pieces, "ab c" + "d" * 40) == "2 1 2 36 40 0 0 4"
    assert page.encoded([[" a ", -1.0], ["b ", -1.0]], "a b") == "2 4 1 4"
    assert page.encoded([["a", -1.0]], "other") == page.encoded([["a", -1.0]] * 3000, "a" * 3000) == ""
    assert page.encoded([["a", float("-inf")]], "a") == "1 36"


# ---------------------------------------------------------------- python -m report


def test_pages_and_figures_are_written(whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    copy = shutil.copytree(whole, tmp_path / "copy")
    (copy / "report.html").unlink()
    assert script.main([str(copy), "--figures", "figures"]) == 0
    assert (copy / "report.html").read_text().startswith("<!doctype html>")
    files = {path.name for path in (tmp_path / "figures").iterdir()}
    assert {"NLL.svg", "loss.svg", "real-length.svg"} <= files
    for name in files:
        ElementTree.parse(tmp_path / "figures" / name)
    assert script.main([str(copy), str(whole)]) == 0 and (tmp_path / "report.html").is_file()
    assert script.main([str(copy), "--out", "page.html"]) == 0 and (tmp_path / "page.html").is_file()


def test_what_people_get_wrong_is_one_line(tmp_path, capsys):
    run = write_run(tmp_path / "run", 3, 2, 1)
    damaged = shutil.copytree(run, tmp_path / "damaged")
    (damaged / "heldout-1.jsonl").write_text('{}\n{"prompt": \n')
    for argv, said in (
        ([tmp_path], "holds no run"), ([run, "--out", "no/such/page.html"], "no/such"),
        ([damaged], "heldout-1.jsonl, line 2: damaged"),
    ):  # fmt: skip
        assert script.main([*map(str, argv)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("report: error: ") and error.count("\n") == 1 and said in error
    with pytest.raises(SystemExit, match="2"):
        script.main([str(run), "--oout", "x"])
    error = capsys.readouterr().err
    assert error.startswith("report: error: ") and error.count("\n") == 1 and "--oout" in error


def test_a_pipe_whose_reader_has_gone(tmp_path):
    """The pipe is that of `| true`: a shell makes 141 of SIGPIPE. The page is there, and nothing is said."""
    run = write_run(tmp_path / "run", 3, 1, 1)
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", "report", str(run)], cwd=ROOT, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (done.returncode, done.stderr) == (-signal.SIGPIPE, b"") and (run / "report.html").is_file()


# ---------------------------------------------------------------- in a browser


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
LOOK = """
<script>
addEventListener("load", () => setTimeout(async () => {
  const set = async (id, value) => {
    const control = document.getElementById(id);
    control.value = value;
    control.dispatchEvent(new Event("input"));
    await new Promise((done) => setTimeout(done, 100));
    const shown = [...document.querySelectorAll(".prompt")].filter((prompt) => prompt.checkVisibility());
    return shown.map((prompt) => prompt.querySelector("th .text").textContent);
  };
  const found = { hacked: window.hacked ?? null, panels: [...document.querySelectorAll("svg.panel")].length };
  found.drawn = [...document.querySelectorAll("svg.panel g")].every((g) => g.getBoundingClientRect().width > 0);
  document.getElementById("responses").scrollIntoView();  // rows are drawn when they come into view
  found.all = await set("kind", "");
  for (let i = 0; i < 200 && document.querySelectorAll("td.text .t").length === 0; i++) {
    await new Promise((done) => requestAnimationFrame(() => setTimeout(done, 10)));
  }
  const count = (cell) => [cell.querySelectorAll(".t").length, cell.querySelectorAll(".new").length];
  found.spans = [...document.querySelectorAll("td.text")].map(count);
  found.better = await set("kind", "better");
  found.same = await set("kind", "same");
  await set("kind", "");
  found.searched = await set("search", "PROMPT 3");
  await set("search", "");
  found.up = await set("order", "up");
  found.down = await set("order", "down");
  found.texts = [...document.querySelectorAll("td.text")].map((cell) => cell.textContent);
  found.resources = performance.getEntriesByType("resource").map((entry) => entry.name);

  const answer = document.createElement("pre");
  answer.id = "answer";
  answer.textContent = encodeURIComponent(JSON.stringify(found));
  document.body.append(answer);
}, 200));
</script>
"""


def browse(path) -> dict:
    """What LOOK found in a page. Fails if the console has a line."""
    if not CHROMIUM:
        pytest.skip("needs Chromium, of which neither `chromium` nor `google-chrome` is installed")
    path.write_text(path.read_text(encoding="utf-8").replace("</body>", f"{LOOK}</body>"), encoding="utf-8")
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--disable-extensions",
        f"--user-data-dir={path.parent / 'profile'}", "--virtual-time-budget=20000", "--dump-dom", path.as_uri(),
    ]  # fmt: skip
    for _ in range(10):  # on a busy machine Chromium may print the page before LOOK has ended
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "CONSOLE" not in done.stderr, done.stderr
        if found := re.search(r'<pre id="answer">(.*?)</pre>', done.stdout):
            return json.loads(unquote(found[1]))
    raise AssertionError("LOOK has not ended")


def test_in_a_browser_filters_work_and_nothing_is_loaded(tmp_path):
    folder = write_run(tmp_path / "run", 6, 2, 2)
    path = tmp_path / "page.html"
    assert script.main([str(folder), "--out", str(path)]) == 0
    found = browse(path)
    order = [4, 5, 0, 1, 2, 3]  # Changed responses come first.
    assert found["all"] == [f"prompt {i}" for i in order]
    assert found["better"] == ["prompt 4", "prompt 5"] and found["same"] == [f"prompt {i}" for i in range(4)]
    assert found["searched"] == ["prompt 3"]
    assert found["up"] == [f"prompt {i}" for i in (5, 4, 3, 2, 1, 0)] and found["down"] == found["up"][::-1]
    # [words, marked words]: three words, then four of which the last is the same, then two that differ in one word.
    assert found["spans"][:4] == [[3, 0], [4, 3], [4, 1], [4, 1]]
    assert found["panels"] == 4 and found["drawn"] and found["resources"] == [] and found["hacked"] is None


def test_in_a_browser_hostile_text_stays_text(tmp_path):
    path = tmp_path / "page.html"
    assert script.main([str(hostile_run(tmp_path / "run")), "--out", str(path)]) == 0
    found = browse(path)
    assert found["hacked"] is None and found["resources"] == []
    for text in HOSTILE[:7]:
        assert text in found["texts"] and f"before {text}" in found["texts"]
