"""report.html and report.py: what the page says, its size, hostile text, and the page in a real browser."""

import html.parser
import json
import math
import re
import shutil
import subprocess
from urllib.parse import unquote
from xml.etree import ElementTree

import pytest
from helpers import begin, rows, small, small_sft

import report as script
import sft
import spin
from runtime import page, panels
from runtime.figures import COLOURS

HOSTILE = [
    "<script>window.hacked = 1</script>", "</script><script>window.hacked = 1</script>", "<!-- <script>",
    "\"'><img src=x onerror='window.hacked=1'>", "{{ 7 * 7 }} {% raw %}", "&lt;b&gt; &amp;", "\u202eright\u200f",
    "\x00\x1b[31m\x7f", "a lone \ud800 surrogate", "x" * 1_000_000, "]]>\u2028\u2029", "javascript:window.hacked=1", "",
]  # fmt: skip


@pytest.fixture(scope="module")
def made(start, data, tmp_path_factory):
    """(the folder of a run of two iterations, the page after each of its iterates)."""
    out, seen, make = tmp_path_factory.mktemp("runs") / "finished", [], page.page
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "page", lambda folders: seen.append(make(folders)) or seen[-1])
        assert spin.main(small(start, data, out=out)) == 0
    return out, seen


@pytest.fixture(scope="module")
def finished(made):
    return made[0]


def heldout_row(i: int, text: str, nll: float, error: float) -> dict:
    real = f"real response {i}"
    words = [[f" {word}" if n else word, -0.5] for n, word in enumerate(text.split(" "))]
    values = {"greedy": [float(text == real), 1.0], "greedy_error": [error, 3.0], "nll": [nll, 3.0], "kl": [0.1, 1.0]}
    tokens = {"greedy": words, "real": [["real", -nll], [" response", 0.0], [f" {i}", 0.0]]}
    return {"prompt": f"prompt {i}", "references": [real], "values": values, "tokens": tokens, "greedy": text}


def write_run(folder, heldout: list[list[dict]], steps: int = 20, **args):
    """Files of a run whose iterate t answered as heldout[t] says."""
    folder.mkdir(parents=True)
    record = {"command": "spin", "args": {"iterations": len(heldout) - 1, "best": "nll", "lr": [1e-3]} | args}
    (folder / "run.json").write_text(json.dumps(record | {"digests": {"model": "12ab"}, "torch": "2"}))
    metrics = []
    for t, lines in enumerate(heldout):
        row = {"iterate": t, "sampled": 0.3 + 0.02 * t, "sampled_se": 0.01, "nll": 1 - 0.1 * t, "nll_se": 0.2}
        changes = {"sampled": [0.02 * t, 0.003], "nll": [-0.1 * t, 0.2]}
        metrics.append(row | ({"since_start": changes, "pairs": 9, "generated": 12, "identical": 3} if t else {}))
        (folder / f"heldout-{t}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        if t:
            signals = dict(loss=0.7, margin=0.1, accuracy=0.5, grad_norm=1.0, lr=1e-3, skipped=False)
            log = [json.dumps({"iteration": t - 1, "step": n + 1} | signals) + "\n" for n in range(steps)]
            (folder / f"steps-{t - 1}.jsonl").write_text("".join(log))
            pair = {"real_ids": [1, 2], "generated_ids": [1, 2, 3], "opponent_real_logp": -2.0}
            (folder / f"pairs-{t - 1}.jsonl").write_text(json.dumps(pair | {"opponent_generated_logp": -6.0}) + "\n")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    times = {"seconds": {"train": 2.0}, "memory": {"train": 2**20}, "pace": [[5, 100.0], [10, 120.0]], "machine": "m"}
    lines = [json.dumps({"iterate": t} | times) + "\n" for t in range(len(heldout))]
    (folder / "times.jsonl").write_text("".join(lines))
    return folder


def answers(count: int, iterates: int, changed: int) -> list[list[dict]]:
    """Of `count` prompts the last `changed` get another response in every iterate, nearer to the reference."""

    def text(i: int, t: int) -> str:
        return f"answer {t if i >= count - changed else 0} to {i}"

    return [
        [heldout_row(i, text(i, t), 2 - t * i / count, 9.0 - t * (i >= count - changed)) for i in range(count)]
        for t in range(iterates + 1)
    ]


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


def test_a_run_writes_its_page_after_every_iterate(made):
    """With all iterates so far; beside it times and memory of each phase, and the pace of training."""
    out, seen = made
    assert [("is not finished: 1 of 2" in text, "Only the start" in text) for text in seen] == [
        (False, True), (True, False), (False, False),
    ]  # fmt: skip
    assert (out / "report.html").read_text() == seen[-1]
    times = rows(out / "times.jsonl")
    assert [row["iterate"] for row in times] == [0, 1, 2]
    assert set(times[1]["seconds"]) == set(times[1]["memory"]) == {"generate", "score", "train", "evaluate"}
    steps = len(rows(out / "steps-0.jsonl"))
    assert times[1]["pace"][-1][0] <= steps and all(rate > 0 for _, rate in times[1]["pace"])
    names = {name for entry in json.loads((out / "checksums.json").read_text())["iterates"] for name in entry}
    assert "metrics.jsonl" in names and not {"report.html", "times.jsonl"} & names


def test_a_page_that_cannot_be_written_is_a_warning(start, data, here, monkeypatch, capsys):
    monkeypatch.setattr(page, "page", lambda folders: 1 / 0)
    assert spin.main(small(start, data, iterations=1)) == 0
    error = capsys.readouterr().err
    assert error.count("report.html: not written (ZeroDivisionError: division by zero)") == 2, "a line for each iterate"
    assert (here / "run/final/model.safetensors").is_file() and not (here / "run/report.html").exists()


def test_tokens_have_the_log_probabilities_that_a_pass_over_them_gives(finished, start, data, tmp_path):
    """Of the start's greedy responses and of the real ones, token by token; the pieces of these make up the text."""
    player, _, run = begin(start, data, tmp_path / "again")
    responses = player.respond([e.prompt_ids for e in run.heldout], 0, temperature=0.0)
    for row, example, (greedy, _) in zip(rows(finished / "heldout-0.jsonl"), run.heldout, responses, strict=True):
        for name, ids in (("greedy", greedy), ("real", example.real_ids)):
            (by_token,) = player.logps_by_token([(example.prompt_ids, ids)])
            (first,) = player.response_logps([(example.prompt_ids, ids[:1])]).tolist()
            assert by_token[0] == pytest.approx(first[0], abs=1e-4)
            pieces, logps = zip(*row["tokens"][name])
            expected, expected_logps = zip(*run.pieces(ids, by_token))
            assert pieces == expected and list(logps) == pytest.approx(expected_logps, abs=0.002)
        assert "".join(pieces).strip() == example.references[0]
        assert sum(logps) == pytest.approx(-row["values"]["nll"][0], abs=0.001 * len(logps))  # of the real response


def test_bytes_of_one_character_are_one_piece(start, data, tmp_path):
    _, _, run = begin(start, data, tmp_path / "run")
    ids = run.tokenizer.encode("a\u00e9\U0001f600b").ids
    pieces = run.pieces([*ids, run.eos_token_id], [-0.5] * (len(ids) + 1))
    assert [text for text, _ in pieces] == ["a", "\u00e9", "\U0001f600", "b", ""]
    assert sum(logp for _, logp in pieces) == -0.5 * (len(ids) + 1)


# ---------------------------------------------------------------- what the page says


def test_the_headline_tells_changes_from_noise(tmp_path):
    run = panels.Loaded(write_run(tmp_path / "run", answers(4, 2, 2)))
    sentences = page.headline(run)
    assert sentences == [
        "Sampled accuracy rose from 30.0% to 34.0% (+4.0 \u00b1 0.3 points, better).",
        "NLL did not change by more than two standard errors.",
        "No iterate is better by NLL.",
    ]
    assert not any("entropy" in sentence for sentence in sentences)
    run.rows[-1]["at_equal_entropy"] = {"temperature": 0.93, "sampled": [0.004, 0.003], "other": "damaged"}
    assert page.headline(run)[2] == (
        "Against the start at temperature 0.93, which has the same entropy: sampled accuracy +0.4 \u00b1 0.3 points."
    )
    run.args |= {"best": "sampled", "iterations": 3}
    assert page.headline(run)[0] == "The run is not finished: 2 of 3 iterations."
    assert page.headline(run)[-1] == "The best iterate by sampled accuracy is 2."


def test_the_page_of_a_real_run(finished):
    """Every panel has its figure, every table its numbers; what a figure shows stays inside it."""
    text = (finished / "report.html").read_text()
    reader = Reader(text)
    shown = {attrs["aria-label"].partition(".")[0] for tag, attrs in reader.tags if tag == "svg"}
    assert {
        "greedy error", "NLL", "KL", "loss", "margin", "accuracy", "grad norm", "lr", "tokens a second", "length",
        "log-ratio, real", "log-ratio, generated", "held-out margin", "truncated", "dropped", "identical to the real",
        "sampled error by entropy",
    } <= shown  # fmt: skip
    ends = re.findall(r'<path class="grid" d="M[\d.]+ (-?[\d.]+)', text)
    assert ends and all(0 <= float(y) <= 190 for y in ends) and "nan" not in text
    assert "python spin.py" in reader.text and "What is missing" not in reader.text
    digest = json.loads((finished / "run.json").read_text())["digests"]["model"]
    assert digest in reader.text
    scripts = [attrs for tag, attrs in reader.tags if tag == "script"]
    assert scripts == [{}] and not [tag for tag, _ in reader.tags if tag in ("link", "img", "iframe")]


def test_runs_without_some_files_still_get_a_page(finished, start, data, tmp_path):
    """Of an older version, not finished, damaged, or supervised: a line says what is missing."""
    older = shutil.copytree(finished, tmp_path / "older")
    for name in ("heldout-0.jsonl", "heldout-1.jsonl", "heldout-2.jsonl", "steps-1.jsonl", "times.jsonl"):
        (older / name).unlink()
    lines = [{k: v for k, v in row.items() if not k.startswith("since")} for row in rows(older / "metrics.jsonl")]
    (older / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"iterate": 3, "nll')
    text = Reader(page.page([older])).text
    assert "Paired standard errors are not known" in text and "Responses to held-out prompts" not in text
    for name in ("heldout-0.jsonl: missing", "steps-1.jsonl: missing", "times.jsonl: times and memory"):
        assert f"older: {name}" in text
    (older / "metrics.jsonl").unlink()
    assert "No iterate has been evaluated yet." in Reader(page.page([older])).text
    assert sft.main([*small_sft(start, data, iterations=1, out=tmp_path / "sft")]) == 0
    text = Reader((tmp_path / "sft/report.html").read_text()).text
    assert "What is missing" not in text and "python sft.py" in text
    assert "2 runs" in Reader(page.page([finished, older])).text


def test_several_runs_are_compared(tmp_path):
    """What differs between them, the last responses side by side where the prompts are the same, a colour each."""
    one = write_run(tmp_path / "one", answers(5, 2, 2), lr=[1e-3])
    two = write_run(tmp_path / "two", answers(5, 1, 4), lr=[5e-4])
    text = page.page([one, two])
    table = text[text.index("What differs") : text.index("All options")]
    assert "--lr" in table and "0.0005" in table and "--iterations" in table and "--best" not in table
    assert f'class="s1" fill="{COLOURS[1]}"' in text and "answer 2 to 4" in text and "answer 1 to 4" in text
    other = write_run(tmp_path / "other", [lines[1:] for lines in answers(5, 1, 4)])
    text = page.page([one, other])
    assert "Responses to held-out" not in text and "evaluated on different prompts" in text


def test_the_command_says_which_options_are_not_the_defaults(finished):
    assert "--rank 4 --lora-dropout 0.1" in panels.Loaded(finished).command
    assert "--top-k" not in panels.Loaded(finished).command and "--mix-previous" in panels.Loaded(finished).command


def test_the_page_stays_below_a_megabyte(tmp_path):
    """10 iterations, 5,000 held-out prompts, 2,000 steps each: the changed responses come first, and it says so."""
    run = write_run(tmp_path / "run", answers(5000, 10, 600), steps=2000)
    text = page.page([run])
    assert len(text.encode()) < 1_000_000
    kinds = [attrs["data-kind"] for tag, attrs in Reader(text).tags if tag == "tbody" and "data-kind" in attrs]
    count = kinds.count("better")
    assert count >= 300 and kinds == ["better"] * count + ["same"] * (len(kinds) - count)
    words = " ".join(Reader(text).text.split())
    assert f"{len(kinds)} of 5,000 held-out prompts" in words and "got better 600" in words


def hostile_run(folder):
    rows = answers(len(HOSTILE), 1, 0)
    for i, text in enumerate(HOSTILE):
        for t in (0, 1):
            said = text if t else f"before {text}"
            pieces = [[said, -1.0]]
            rows[t][i] |= {"prompt": text, "references": [text], "greedy": said, "tokens": {"greedy": pieces}}
    return write_run(folder, rows, template="</script><script>window.hacked = 1</script>", model="<b>\ud800")


def test_hostile_text_is_text(tmp_path):
    """Data, responses and options: the page has the tags of a harmless one, and can be written as UTF-8."""
    text = page.page([hostile_run(tmp_path / "<img src=x onerror=hacked>")])
    tags = Reader(text).tags
    assert [tag for tag, _ in tags if tag in ("script", "img", "b") or tag.startswith("!")].count("script") == 1
    assert not [tag for tag, attrs in tags if tag == "img" or any(name.startswith("on") for name in attrs)]
    shown = Reader(text).text
    for hostile in HOSTILE[:7]:
        assert hostile in shown
    assert "\u2400\u241b[31m\u2421" in shown and "[... 998,000 more characters]" in shown
    assert len(text.encode()) < 1_000_000 and "\x00" not in text


def test_tokens_are_encoded_in_two_characters():
    pieces = [["ab", -0.25], [" c", -100.0], ["d" * 40, 0.0], ["", -1.0]]
    code = page.encoded(pieces, "ab c" + "d" * 40)
    assert [(code[i], code[i + 1]) for i in range(0, len(code), 2)] == [("2", "1"), ("2", "z"), ("z", "0"), ("5", "0")]
    assert page.encoded([[" a ", -1.0], ["b ", -1.0]], "a b") == "2414"
    assert page.encoded([["a", -1.0]], "other") == page.encoded(None, "a") == page.encoded([["a", "x"]], "a") == ""
    assert page.encoded([["a", -math.inf]], "a") == "1z"


# ---------------------------------------------------------------- report.py


def test_files_with_other_values_are_one_line(tmp_path, capsys):
    folder = write_run(tmp_path / "run", answers(3, 2, 1))
    line = json.dumps({"prompt": "p", "references": 4, "greedy": 5, "values": 6, "tokens": 7})
    (folder / "heldout-1.jsonl").write_text(3 * f"{line}\n")
    assert script.main([str(folder), "--out", str(tmp_path / "page.html")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"{folder}: a file has other values than a run writes" in error


def test_report_py_writes_pages_and_figures(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    copy = shutil.copytree(finished, tmp_path / "copy")
    (copy / "report.html").unlink()
    assert script.main([str(copy), "--figures", "figures"]) == 0
    assert (copy / "report.html").read_text().startswith("<!doctype html>")
    files = {path.name for path in (tmp_path / "figures").iterdir()}
    assert {"metrics.svg", "NLL.svg", "loss.svg", "length.svg"} <= files
    for name in files:
        ElementTree.parse(tmp_path / "figures" / name)
    assert script.main([str(copy), str(finished)]) == 0 and (tmp_path / "report.html").is_file()
    assert script.main([str(copy), "--out", "page.html"]) == 0 and (tmp_path / "page.html").is_file()
    capsys.readouterr()
    for argv, said in (
        ([str(tmp_path)], "holds no run"), ([], "required: RUN"), ([str(copy), "--png"], "--figures"),
        ([str(copy), "--out", "no/such/page.html"], "no/such"),
    ):  # fmt: skip
        assert script.main(argv) == 2
        error = capsys.readouterr().err
        assert error.startswith("report.py: error: ") and error.count("\n") == 1 and said in error
    (copy / "run.json").write_text("[]")
    assert script.main([str(copy)]) == 2 and "run.json: damaged" in capsys.readouterr().err


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
  found.wide = document.documentElement.scrollWidth - innerWidth;
  found.paper = getComputedStyle(document.body).backgroundColor;
  const answer = document.createElement("pre");
  answer.id = "answer";
  answer.textContent = encodeURIComponent(JSON.stringify(found));
  document.body.append(answer);
}, 200));
</script>
"""


def browse(path, *flags: str, look: bool = True) -> tuple[dict, str]:
    """What LOOK found in a page, and its DOM afterwards. Fails where the console has a line."""
    if not CHROMIUM:
        pytest.skip("needs Chromium, of which neither `chromium` nor `google-chrome` is installed")
    if look:
        path.write_text(path.read_text(encoding="utf-8").replace("</body>", f"{LOOK}</body>"), encoding="utf-8")
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--disable-extensions",
        f"--user-data-dir={path.parent / 'profile'}", "--virtual-time-budget=20000", *flags,
        "--dump-dom", path.as_uri(),
    ]  # fmt: skip
    for _ in range(10):  # on a busy machine Chromium may print the page before LOOK has ended
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "CONSOLE" not in done.stderr, done.stderr
        found = re.search(r'<pre id="answer">(.*?)</pre>', done.stdout)
        if found or not look:
            return json.loads(unquote(found[1])) if found else {}, done.stdout
    raise AssertionError("LOOK has not ended")


def test_in_a_browser_filters_work_and_nothing_is_loaded(tmp_path):
    folder = write_run(tmp_path / "run", answers(6, 2, 2))
    path = tmp_path / "page.html"
    assert script.main([str(folder), "--out", str(path)]) == 0
    found, _ = browse(path)
    order = [4, 5, 0, 1, 2, 3]  # the changed ones first
    assert found["all"] == [f"prompt {i}" for i in order]
    assert found["better"] == ["prompt 4", "prompt 5"] and found["same"] == [f"prompt {i}" for i in range(4)]
    assert found["searched"] == ["prompt 3"]
    assert found["up"] == [f"prompt {i}" for i in (5, 4, 3, 2, 1, 0)] and found["down"] == found["up"][::-1]
    # three words, then four of which the last is the same, then two responses that differ in one
    assert found["spans"][:4] == [[3, 0], [4, 3], [4, 1], [4, 1]]
    assert found["panels"] >= 12 and found["drawn"] and found["resources"] == [] and found["hacked"] is None


def test_in_a_browser_hostile_text_stays_text(tmp_path):
    path = tmp_path / "page.html"
    assert script.main([str(hostile_run(tmp_path / "run")), "--out", str(path)]) == 0
    found, _ = browse(path)
    assert found["hacked"] is None and found["resources"] == []
    for text in HOSTILE[:7]:
        assert text in found["texts"] and f"before {text}" in found["texts"]


def test_in_a_browser_on_a_narrow_dark_screen_and_without_scripts(finished, tmp_path):
    """No sideways scrolling, another paper; without scripts all rows are there, and no controls that do nothing."""
    path = tmp_path / "page.html"
    shutil.copy(finished / "report.html", path)
    found, _ = browse(path, "--window-size=500,900", "--blink-settings=preferredColorScheme=0")
    assert found["wide"] <= 0 and found["paper"] == "rgb(20, 23, 27)" and found["drawn"]
    path.write_text(re.sub("(?s)<script>.*</script>", "", (finished / "report.html").read_text()))
    _, dom = browse(path, look=False)
    count = len(rows(finished / "heldout-0.jsonl"))
    assert dom.count('<tbody class="prompt"') == count and '<div class="controls" hidden="">' in dom
