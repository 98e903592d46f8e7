"""Reports and comparisons: what they say, what they refuse, that they invent nothing; and the page in a browser."""

import json
import re
from html.parser import HTMLParser

import pytest
from browser import CHROMIUM, WHY_NOT, Browser
from report_runs import analysed, changed, real_run, trained, tuned, write

from secateur import report
from secateur.checkpoint import Checkpoint
from secateur.checkpoint.lineage import earlier
from secateur.errors import ReportError
from secateur.plan import PruningPlan
from secateur.report.checks import checks
from secateur.report.choosing import chosen
from secateur.report.facts import NOT_MEASURED, headlines, table

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason=WHY_NOT)
VOID = {"meta", "link", "br", "hr", "img", "input", "path", "use", "rect"}


@pytest.fixture(scope="module")
def run(checkpoint_folder, text_file, tmp_path_factory):
    return real_run(tmp_path_factory.mktemp("report") / "run", checkpoint_folder, text_file)


@pytest.fixture(scope="module")
def results(run):
    return json.loads((run / "results.json").read_text())


class Page(HTMLParser):
    """What a page consists of; refuses tags that are not closed in order, and ids that are there twice."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.ids, self.tags, self.addresses, self.words = [], set(), [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        assert given.get("id") not in self.ids
        self.ids |= {given["id"]} if "id" in given else set()
        self.tags.append(tag)
        self.addresses += [given[name] for name in ("href", "src", "xlink:href") if name in given]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_a_run_leaves_its_report(run, results):
    text = (run / "report.html").read_text()
    page = Page(text)
    assert len(text) < 2_000_000 and "<script" not in text
    assert all(address.startswith(("#", "data:")) for address in page.addresses)
    assert page.tags.count("figure") == page.tags.count("figcaption") == page.tags.count("svg") >= 4
    said = " ".join(" ".join(page.words).split())
    figures = next(iter(results["perplexity"].values()))
    params = results["params"]
    for told in (
        f"{params['dense']:,} → {params['pruned']:,} parameters", f"{figures['dense']:.3f}", f"{figures['pruned']:.3f}",
        f"{figures['recovered']:.3f}", results["model"]["sha256"], figures["text_sha256"], "secateur run recipe.yaml",
        f"{abs(figures['recovered'] / figures['dense'] - 1):.1%}", results["protocol"]["versions"]["torch"],
    ):  # fmt: skip
        assert told in said, told


def test_results_hold_what_a_report_shows(run, results):
    plan = PruningPlan.load(run / "pruned" / "plan.json")
    widths = {row["group"]: row for row in results["widths"]}
    assert {name: row["kept"] for name, row in widths.items() if name in plan.kept} == {
        name: len(kept) for name, kept in plan.kept.items()
    }
    assert {row["kind"] for row in widths.values()} == {"ffn_channel", "kv_group"} and len(widths) == 6
    assert all(row["units"] >= row["kept"] and row["layer"] in range(3) for row in widths.values())
    assert {row["group"] for row in results["importance"]} == set(widths)
    assert all(r["least"] <= r["q1"] <= r["median"] <= r["q3"] <= r["most"] for r in results["importance"])
    macs, timed = results["macs"], results["benchmark"]
    assert (macs["dense"], macs["pruned"]) == (timed["against"]["prefill_macs"], timed["model"]["prefill_macs"])
    samples = results["samples"]
    assert list(samples["continuations"]) == ["dense", "pruned", "recovered"]
    assert all(len(made) == len(samples["prompts"]) == 3 for made in samples["continuations"].values())
    assert results["recipe"]["prune"]["param_sparsity"] == 0.2


def test_a_recipe_in_a_report_can_be_run(run, tmp_path):
    from secateur.config import load_recipe
    from secateur.report.repeating import repeating

    (read,) = report.read_runs([run])
    file = tmp_path / "recipe.yaml"
    file.write_text(repeating(read).recipe)
    assert load_recipe(file) == load_recipe(run / "recipe.yaml")


def test_text_in_evaluation_and_training_is_told(run):
    (read,) = report.read_runs([run])
    found = [check.text for check in checks(read) if check.verdict == "no"]
    assert any("stories is not held out: the model was trained on stories.txt" in text for text in found)


CHOICE = {"uniform": 4.0, "hidden_per_layer": 3.9, "hidden_shares": {"hidden_per_layer": 0.125}, "gain": 0.1,
          "standard_error": 0.01, "over": "uniform", "sequences": 32, "chosen": "hidden_per_layer"}  # fmt: skip


def test_the_choice_of_a_form_is_told(results, tmp_path):
    (read,) = report.read_runs([write(tmp_path / "chosen", changed(results, choice=CHOICE))])
    found = chosen(read)
    assert found.rows == [
        ["the same widths in every layer", "54.598", "", ""],
        ["widths by layer and a smaller hidden size", "49.402", "12.5%", "yes"],
    ]
    assert "32 calibration sequences" in found.told and "9.5% lower than with the same widths in" in found.told
    said = " ".join(" ".join(Page(report.page([read])).words).split())
    assert "Which form it has" in said and "widths by layer and a smaller hidden size 49.402 12.5% yes" in said
    assert "| widths by layer and a smaller hidden size | 49.402 | 12.5% | yes |" in report.markdown([read])
    asked = {"uniform": 4.0, "per_layer": 4.1, "sequences": 32, "chosen": "uniform"}  # the share was the user's own
    (read,) = report.read_runs([write(tmp_path / "plain", changed(results, choice=asked))])
    assert chosen(read).head == ["form", "perplexity", "taken"] and len(chosen(read).rows[0]) == 3


def test_a_form_without_a_choice_says_why(results, tmp_path):
    why = {"chosen": "uniform", "why": "8 calibration sequences are too few to choose by, 16 would do (--samples)"}
    (read,) = report.read_runs([write(tmp_path / "alone", changed(results, choice=why))])
    assert chosen(read).rows == [] and "The same widths in every layer: 8 calibration" in report.page([read])
    (read,) = report.read_runs([write(tmp_path / "none", results)])
    assert chosen(read) is None and "Which form it has" not in report.page([read])


def test_what_a_budget_counts_is_told(results, tmp_path):
    def told(name, asked, **cost):
        cost = {"batch": 1, "length": 512, "sparsity": 0.31} | cost
        protocol = changed(results["protocol"], settings={f"{name}_sparsity": asked})
        (read,) = report.read_runs([write(tmp_path / name, changed(results, cost=cost, protocol=protocol))])
        (row,) = (row for row in table(read)[1] if "1 x 512 tokens" in row.how)
        (check,) = (check for check in checks(read) if "1 x 512 tokens" in check.text)
        return row.name, row.cells, check.verdict, check.text

    name, cells, verdict, text = told("latency", 0.3, what="latency", dense=0.2, pruned=0.15)
    assert (name, cells, verdict) == ("Seconds of a pass", ("0.2", "0.15", NOT_MEASURED), "note")
    assert "30.0% were to go, 31.0% do by the table of widths, and the cut model has −25.0%" in text
    _, cells, verdict, _ = told("memory", 0.25, what="memory", dense=8_000_000, pruned=6_000_000)
    assert (cells, verdict) == (("8,000,000", "6,000,000", "6,000,000"), "yes")
    assert told("mac", 0.3, what="macs", dense=100, pruned=120)[2] == "no"


@pytest.mark.parametrize(("cost", "counted"), [(None, "parameters"), ("memory", "memory")])
def test_what_other_budgets_would_cost_is_drawn(results, tmp_path, cost, counted):
    more = {"tradeoff": [[0.05, 0.01], [0.1, 0.03]]}
    if cost:
        more["cost"] = {"what": cost, "batch": 1, "length": 8, "sparsity": 0.1, "dense": 100, "pruned": 88}
    (read,) = report.read_runs([write(tmp_path / "curve", changed(results, **more))])
    (axes,) = next(picture for _, picture in report.drawn([read]) if picture.name == "tradeoff").figure.axes
    assert axes.get_xlabel() == f"{counted} removed [%]"
    curve, here = axes.lines
    assert curve.get_xydata().tolist() == [[0, 0], [5, 0.01], [10, 0.03]]
    assert here.get_xdata()[0] == pytest.approx(10 if cost else 100 * results["params"]["sparsity"])
    (read,) = report.read_runs([write(tmp_path / "none", results)])
    assert "tradeoff" not in [picture.name for _, picture in report.drawn([read])]


def test_what_was_not_measured_is_no_number(results, tmp_path):
    bare = {name: results[name] for name in ("schema", "command", "model", "protocol", "params")}
    (read,) = report.read_runs([write(tmp_path / "bare", bare)])
    assert [h.figure for h in headlines(read)] == ["20.0%", NOT_MEASURED, NOT_MEASURED]
    untimed = changed(results)
    del untimed["benchmark"]
    (read,) = report.read_runs([write(tmp_path / "untimed", untimed)])
    _, speed, _ = headlines(read)
    assert speed.figure == NOT_MEASURED and "MACs" in speed.detail and speed.tone == "missing"
    Page(report.page([read]))
    no_dense = changed(results)
    for figures in no_dense["perplexity"].values():
        del figures["dense"]
    (read,) = report.read_runs([write(tmp_path / "no-dense", no_dense)])
    assert headlines(read)[2].figure == NOT_MEASURED
    stages, rows = table(read)
    row = next(row for row in rows if row.name.startswith("Perplexity"))
    assert row.cells[stages.index("dense")] == NOT_MEASURED


@pytest.mark.parametrize(
    "name", ["<script>alert(1)</script>", "a & b \"c\" 'd'", "x$\\frac{1}{2}$", "|`pipe`|\n# head"]
)
def test_names_of_users_are_text(results, tmp_path, name):
    prompts = {"prompts": [name], "new_tokens": 1, "decoding": "greedy", "continuations": {"dense": [name]}}
    model = results["model"] | {"source": name}
    text = {name: next(iter(results["perplexity"].values()))}
    found = report.read_runs([write(tmp_path / "r", changed(results, model=model, samples=prompts, perplexity=text))])
    html = report.page(found)
    page = Page(html)
    assert "<script" not in html and "alert" not in page.tags
    assert name.split("\n")[0] in "".join(page.words)
    lines = report.markdown(found).splitlines()
    assert "# head" not in lines and not any("<script>" in line and "\\<script" not in line for line in lines
                                             if not line.startswith("  ") and "source:" not in line)  # fmt: skip


def test_methods_show_what_they_have(results, tmp_path):
    places = [write(tmp_path / name, make(results)) for name, make in
              (("while-training", trained), ("adapter", tuned), ("knowledge", analysed))]  # fmt: skip
    names = [{picture.name for _, picture in report.drawn([run])} for run in report.read_runs(places)]
    assert {"sparsity", "mix-shares-training", "mix-distances-training", "widths", "loss-training"} <= names[0]
    assert {"rank", "rank-modules", "loss-training"} <= names[1] and "widths" not in names[1]
    assert names[2] == {"knowledge"}
    Page(report.page(report.read_runs(places)))


def test_layers_that_went_are_shown(results, tmp_path):
    row = {"group": "model.layers/layer", "kind": "layer", "layer": None, "units": 3, "kept": 2, "which": "0,2"}
    (read,) = report.read_runs([write(tmp_path / "depth", changed(results, widths=[row]))])
    picture = next(picture for _, picture in report.drawn([read]) if picture.name == "which-layer")
    assert "1 of 3 layers went; those that stay are 0,2." in picture.caption


def test_a_recovered_checkpoint_tells_of_its_cut(run, results):
    (read,) = report.read_runs([run / "recovered"])
    assert read.sparsity == results["params"]["sparsity"] and read.stages == ["dense", "pruned", "recovered"]
    assert [h.figure for h in headlines(read)][0::2] == [h.figure for h in headlines(report.read_runs([run])[0])][0::2]
    assert read.widths and read.samples and list(read.samples.continuations) == ["dense", "pruned", "recovered"]


def test_what_the_cut_chose_is_told_of_what_is_made_from_it(results, tmp_path):
    """Later steps keep of earlier results what a report needs."""
    more = {"choice": CHOICE, "tradeoff": [[0.05, 0.01]],
            "cost": {"what": "macs", "batch": 1, "length": 8, "sparsity": 0.2, "dense": 100, "pruned": 80}}  # fmt: skip
    folder = write(tmp_path / "pruned", changed(results, command="prune", **more))
    base = Checkpoint(None, None, str(folder), None, "llama")
    after = changed({k: results[k] for k in ("schema", "model", "protocol")}, command="recover", before=earlier(base))
    (read,) = report.read_runs([write(tmp_path / "recovered", after)])
    assert chosen(read).rows and "MACs of a pass" in [row.name for row in table(read)[1]]
    assert "tradeoff" in [picture.name for _, picture in report.drawn([read])]


def test_compare_over_methods_ratios_and_seeds(secateur, results, run, tmp_path):
    other = changed(results, protocol=results["protocol"] | {"seed": 7})
    text = next(iter(other["perplexity"].values()))
    text["recovered"] += 1.0
    half = changed(results, params=results["params"] | {"sparsity": 0.5, "pruned": 1000})
    half["protocol"] |= {"method": "loraprune"}
    places = [run, write(tmp_path / "seed-7", other), write(tmp_path / "half", half)]
    code, out, err = secateur("compare", *places, "--json", tmp_path / "c.json", "--markdown", tmp_path / "c.md",
                              "--png", tmp_path / "figures")  # fmt: skip
    assert code == 0, err
    told = json.loads((tmp_path / "c.json").read_text())
    assert [line["sparsity"] for line in told["lines"]] == [results["params"]["sparsity"]] * 2 + [0.5]
    (mean,) = told["means"]
    assert mean["mean"] == pytest.approx(text["recovered"] - 0.5) and mean["deviation"] == pytest.approx(0.5**0.5)
    assert "loraprune" in out and "2 seeds" in out and "| seed-7 |" in (tmp_path / "c.md").read_text()
    assert [file.suffix for file in (tmp_path / "figures").iterdir()] == [".png"]


def test_runs_of_other_settings_are_not_averaged(results, tmp_path):
    """A sweep over rankings and seeds: one mean for each ranking."""
    places = []
    for ranking, shift in (("local", 0.0), ("global", 200.0)):
        for seed in (1, 2, 3):
            one = changed(
                results,
                recipe=results["recipe"] | {"seed": seed, "prune": results["recipe"]["prune"] | {"ranking": ranking}},
            )
            one["protocol"] |= {"seed": seed}
            for text in one["perplexity"].values():
                text["recovered"] = 100.0 + seed + shift
            places.append(write(tmp_path / f"{ranking}-{seed}", one))
    found = report.compare(report.read_runs(places))
    assert {line.method for line in found.lines} == {"llm-pruner, ranking=local", "llm-pruner, ranking=global"}
    assert {(m.method, m.seeds, m.mean, m.deviation) for m in found.means} == {
        ("llm-pruner, ranking=local", (1, 2, 3), 102.0, 1.0), ("llm-pruner, ranking=global", (1, 2, 3), 302.0, 1.0),
    }  # fmt: skip
    (picture,) = report.comparison_pictures(report.read_runs(places))
    labels = [text.get_text() for legend in picture.figure.legends for text in legend.get_texts()]
    assert any("ranking=global" in label for label in labels)


TASKS = {"n": 100, "of": 250, "metric": "acc", "value": 0.6, "stderr": 0.05, "acc": 0.6, "acc_stderr": 0.05}


def test_an_evaluation_of_tasks_alone_shows_its_figures(results, tmp_path):
    alone = {name: results[name] for name in ("schema", "model", "protocol")}
    average = {"value": 0.6, "stderr": 0.05, "tasks": 2, "metrics": {"piqa": "acc", "boolq": "acc"}}
    place = write(tmp_path / "eval", alone | {"command": "eval", "tasks": {"piqa": TASKS}, "tasks_average": average})
    (run,) = report.read_runs([place])
    told = report.markdown([run])
    assert "0.600 ± 0.050" in told and "acc of piqa, acc of boolq" in told


@pytest.mark.parametrize(("now", "word", "tone"), [(0.3, "Worse by", "bad"), (0.57, "Worse by", "plain")])
def test_what_a_cut_cost_is_told_by_tasks_where_no_text_was_measured(results, tmp_path, now, word, tone):
    after = TASKS | {"value": now, "acc": now}
    other = changed(results, perplexity={}, tasks={"piqa": {"dense": TASKS, "recovered": after}})
    (run,) = report.read_runs([write(tmp_path / "tasks", other)])
    (headline,) = [h for h in report.facts.headlines(run) if "by" in h.question and "acc of piqa" in h.detail]
    assert (headline.question, headline.figure, headline.tone) == (word, f"{100 * (0.6 - now):.1f} points", tone)
    assert any("measured on the same tasks" in check.text for check in report.checks.checks(run))


def test_adapters_are_compared_by_what_is_left_of_them_and_by_their_tasks(secateur, results, tmp_path):
    places = []
    for seed, value in ((1, 0.6), (2, 0.7)):
        one = tuned(results) | {"protocol": results["protocol"] | {"seed": seed},
                                "tasks": {"sst2": {"dense": TASKS, "tuned": TASKS | {"value": value, "acc": value}}},
                                }  # fmt: skip
        places.append(write(tmp_path / f"seed-{seed}", one))
    found = report.compare(report.read_runs(places))
    assert {(line.sparsity, line.of_adapter, line.parameters) for line in found.lines} == {(0.5, True, 400)}
    assert [line.tasks["sst2"] for line in found.lines] == [("acc", 0.6), ("acc", 0.7)]
    assert {(m.method, m.sparsity, m.stage, m.seeds) for m in found.means} == {("prunedlora", 0.5, "tuned", (1, 2))}
    (picture,) = report.comparison_pictures(report.read_runs(places))
    axes = picture.figure.axes[0]
    assert "of the adapter" in axes.get_xlabel() and set(axes.lines[0].get_xdata()) == {50.0}
    code, out, err = secateur("compare", *places)
    assert code == 0 and "of the" in out and "0.700" in out, err


def test_figures_that_do_not_compare_are_said_to(results, tmp_path):
    other = changed(results)
    other["model"] = results["model"] | {"sha256": "0" * 64}
    for text in other["perplexity"].values():
        text["seq_len"] = 64
    places = [write(tmp_path / name, r) for name, r in (("a", results), ("b", other))]
    warnings = " ".join(report.compare(report.read_runs(places)).warnings)
    assert "began with different models" in warnings and "measured in another way" in warnings


def test_a_folder_of_runs_is_all_of_them(secateur, results, tmp_path):
    few = {name: value for name, value in results.items() if name not in ("importance", "recovery")}
    for name in ("a", "b"):
        write(tmp_path / "runs" / name, few)
    code, out, err = secateur("report", tmp_path / "runs", "--png", tmp_path / "png", "--markdown", tmp_path / "r.md")
    assert code == 0, err
    assert (tmp_path / "runs" / "report.html").exists() and "2 runs compared" in (tmp_path / "r.md").read_text()
    assert {f"{name}-widths.png" for name in "ab"} <= {file.name for file in (tmp_path / "png").iterdir()}
    assert not list(tmp_path.rglob("*.part")) and "report.html" in out


BROKEN = {
    "nothing": (None, "does not exist"),
    "an empty folder": ("", "has no results.json"),
    "no JSON": ("{", "is no JSON, or cut short"),
    "other JSON": ("[1]", "is no results file"),
    "another schema": ('{"schema": 2, "command": "run"}', "has results schema 2; expected 1"),
    "another command": ('{"schema": 1, "command": "dance", "model": {"source": "m"}}', "command: "),
    "no model": ('{"schema": 1, "command": "run"}', "model: Field required"),
    "no number": (
        '{"schema": 1, "command": "run", "model": {"source": "m"}, "params": {"dense": "x"}}',
        "params.dense",
    ),
    "infinite": ('{"schema": 1, "command": "run", "model": {"source": "m"}, "params": {"dense": Infinity}}', "finite"),
}


@pytest.mark.parametrize("verb", ["report", "compare"])
@pytest.mark.parametrize("case", BROKEN)
def test_what_is_no_result_is_refused(secateur, tmp_path, verb, case):
    text, message = BROKEN[case]
    folder = tmp_path / "run"
    if text is not None:
        folder.mkdir()
    if text:
        (folder / "results.json").write_text(text)
    before = set(tmp_path.rglob("*"))
    code, _, err = secateur(verb, folder)
    assert code == 2 and err.startswith("error: ") and message in err and "expected" in err
    assert set(tmp_path.rglob("*")) == before


def test_a_report_that_cannot_be_written(secateur, run, tmp_path):
    code, _, err = secateur("report", run, "-o", tmp_path / "no" / "r.html")
    assert code == 2 and "cannot be written" in err and not list(tmp_path.iterdir())
    with pytest.raises(ReportError, match="given twice"):
        report.read_runs([run, run / "results.json"])


def test_the_same_results_give_the_same_page(run):
    pages = [report.page(report.read_runs([run])) for _ in range(2)]
    assert pages[0] == pages[1] and not re.search(r"/tmp/\S+\.html", pages[0])


@pytest.fixture(scope="module")
def page(run, results, tmp_path_factory):
    """A report with every kind of figure in it, and a hostile name."""
    folder = tmp_path_factory.mktemp("pages")
    results = changed(results, model=results["model"] | {"source": "<script>alert(1)</script>"})
    others = [write(folder / name, make(results)) for name, make in
              (("while-training", trained), ("adapter", tuned), ("knowledge", analysed))]  # fmt: skip
    runs = report.read_runs([run, *others])
    file = folder / "report.html"
    report.write_text(file, report.page(runs))
    return file, len(report.drawn(runs))


@pytest.fixture(scope="module")
def browser():
    with Browser() as found:
        yield found


@needs_browser
def test_it_is_silent_whole_and_small(browser, page):
    file, figures = page
    browser.open(file)
    assert not browser.said and not browser.fetched
    assert browser.run("document.scripts.length") == 0 and file.stat().st_size < 2_000_000
    shown = "[...document.querySelectorAll('figure svg')].map(s => [s.getBoundingClientRect().height, "
    shown += "s.getAttribute('role'), s.getAttribute('aria-labelledby').split(' ')"
    shown += ".every(id => document.getElementById(id).textContent.length > 3)])"
    found = browser.run(shown)
    assert len(found) == figures and all(height > 100 and role == "img" and named for height, role, named in found)
    assert browser.run("document.querySelectorAll('figure > figcaption').length") == figures
    ids = browser.run("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))


@needs_browser
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [375, 1200])
def test_text_stands_out_and_fits(browser, page, width, dark):
    browser.open(page[0], width=width, dark=dark)
    back = browser.run("getComputedStyle(document.body).backgroundColor")
    assert (back != "rgb(255, 255, 255)") == dark
    found = browser.contrasts()
    assert len(found) > 200 and not [row for row in found if row[0] < 4.5]
    assert browser.run("document.documentElement.scrollWidth") <= width
    scales = "[...document.querySelectorAll('figure svg')].map(s => s.clientWidth / s.viewBox.baseVal.width)"
    assert min(browser.run(scales)) * 10 >= 8.5  # pixels of the text in figures


@needs_browser
def test_everything_can_be_reached_by_keyboard(browser, page):
    browser.open(page[0])
    reached = []
    for _ in range(40):
        browser.press("Tab")
        named = "(e => `${e.tagName} ${e.ariaLabel || e.textContent.trim()}`)(document.activeElement)"
        reached.append(browser.run(named))
    assert reached[0] == "A Skip to the report"
    assert any(name.startswith("SUMMARY") for name in reached) and "DIV Runs side by side" in reached
    hidden = "[...document.querySelectorAll('.scroll, pre')].every(e => e.tabIndex === 0 && e.ariaLabel)"
    assert browser.run(hidden)


@needs_browser
def test_print_shows_everything_on_white(browser, page):
    browser.open(page[0], dark=True)
    browser.look(width=800, dark=True, media="print")
    assert browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not [row for row in browser.contrasts() if row[0] < 4.5]
    assert browser.run("document.querySelector('details pre').getBoundingClientRect().height") > 100
    assert browser.run("document.documentElement.scrollWidth") <= 800
