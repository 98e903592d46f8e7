"""Model cards, and what goes along from the folder that a model was made from."""

import json
import shutil
from dataclasses import replace

import huggingface_hub
import pytest
from families import make
from huggingface_hub import ModelCard
from test_hub import pruned

from secateur import checkpoint
from secateur.checkpoint import Checkpoint, Form, account, lineage
from secateur.checkpoint.card import NO_LICENCE, model_card
from secateur.discovery import discover
from secateur.plan import PruningPlan

FORM = Form("`SomeClass`, float32", 1234, "call it")
PLAN = PruningPlan({"layers.0.mlp/ffn": (0, 1), "layers.1.mlp/ffn": (0, 1, 2)},
                   {"layers.0.mlp/ffn": 4, "layers.1.mlp/ffn": 4})  # fmt: skip
STEP = {
    "command": "prune",
    "model": {"source": "a/folder/dense", "sha256": "0123456789abcdef"},
    "protocol": {"settings": {"criterion": "l2", "iterations": 1, "uniform": False}, "seed": 3},
    "params": {"dense": 100, "pruned": 80, "sparsity": 0.2},
}


def base_with(folder, readme):
    (folder / "README.md").write_text(readme)
    return Checkpoint(None, None, str(folder), "0123456789abcdef", "llama")


def card_of(base=None, results=STEP, plan=PLAN, form=FORM):
    return ModelCard(model_card(form, results, plan, base))


def test_metadata_of_a_folder_is_carried_over(tmp_path):
    given = "license: other\nlicense_name: own\nlicense_link: https://x.org/l\nlanguage: [en, de]\n"
    base = base_with(tmp_path, f"---\n{given}base_model: org/dense\ntags: [chat]\n---\nText\n")
    card = card_of(base)
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["pruned", "secateur"],
        "base_model": "org/dense",
        "license": "other",
        "license_name": "own",
        "license_link": "https://x.org/l",
        "language": ["en", "de"],
        "base_model_relation": "finetune",
    }
    assert "[own](https://x.org/l)" in card.text
    assert "from the checkpoint `dense` (sha256 `0123456789ab`)" in card.text and "a/folder" not in card.text


@pytest.mark.parametrize("named", ["/home/me/model", "../model", "a/b/c", "[org/a, /home/b]", ".", "7"])
def test_what_is_no_hub_name_is_not_named_as_base(tmp_path, named):
    data = card_of(base_with(tmp_path, f"---\nbase_model: {named}\nlicense: mit\n---\n")).data.to_dict()
    assert data["license"] == "mit" and not {"base_model", "base_model_relation"} & set(data)


@pytest.mark.parametrize("readme", ["", "# No metadata\n", "---\n- a list\n---\n", "---\na: [b\n---\n", "---\n---\n"])
def test_a_card_without_metadata_says_that_no_licence_was_found(tmp_path, readme):
    card = card_of(base_with(tmp_path, readme))
    assert card.data.license is None and NO_LICENCE in card.text


def test_metadata_of_a_hub_model_comes_from_its_card(tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_link: LICENSE\nbase_model: org/root\n---\n")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda name, file: str(tmp_path / file))
    base = Checkpoint(None, None, "org/dense", None, "llama")
    data = card_of(base).data
    assert (data.base_model, data.license) == ("org/dense", "other")
    assert data.license_link == "https://huggingface.co/org/dense/blob/main/LICENSE"


def test_a_hub_model_whose_card_cannot_be_had(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    card = card_of(Checkpoint(None, None, "org/dense", None, "llama"))
    assert card.data.base_model == "org/dense" and NO_LICENCE in card.text


def test_only_a_file_of_an_unchanged_model_is_called_a_quantisation(tmp_path):
    base = base_with(tmp_path, "---\nbase_model: org/dense\n---\n")
    export = {"command": "export", "model": STEP["model"]}
    gguf = replace(FORM, tags=("gguf",))
    assert card_of(base, export, None, gguf).data["base_model_relation"] == "quantized"
    assert card_of(base, export | {"before": STEP}, None, gguf).data["base_model_relation"] == "finetune"
    assert "base_model_relation" not in card_of(base, export, None).data
    assert card_of(base, export, None, gguf).data.tags == ["secateur", "gguf"]


def test_what_was_cut_and_how():
    text = card_of().text
    assert "20.00% of 100 parameters were removed; 80 are left." in text
    assert "| `layers.*.mlp/ffn` | 2 | 4 | 2 to 3 |" in text
    assert "The units were chosen with `criterion` l2 (seed 3)." in text
    again = STEP | {"before": STEP, "params": {"dense": 80, "pruned": 60, "sparsity": 0.25}}
    text = card_of(results=again).text
    assert text.index("20.00% of 100") < text.index("Then 25.00% of 80") and text.count("The units were chosen") == 2


def test_a_replayed_plan_is_told_by_its_provenance():
    recipe_says = STEP | {"plan": {"provenance": {}}}
    assert "which does not say how they were chosen" in card_of(results=recipe_says).text
    assert "l2" not in card_of(results=recipe_says).text
    provenance = {"settings": {"criterion": "taylor-1"}, "seed": 8, "by": "hand", "model_sha256": "x"}
    text = card_of(results=STEP | {"plan": {"provenance": provenance}}).text
    assert "It says that they were chosen with `criterion` taylor-1, `by` hand (seed 8)." in text
    saved = card_of(results={}, plan=PruningPlan(PLAN.kept, PLAN.units, provenance)).text
    assert "The units were chosen with `criterion` taylor-1, `by` hand (seed 8)." in saved


def test_figures_stand_side_by_side_only_if_measured_in_the_same_way():
    facts = {"text_sha256": "a", "tokens": 10, "seq_len": 4, "stride": None, "bos": False}
    first = STEP | {"perplexity": {"t": facts | {"dense": 1.0, "pruned": 2.0}}}
    same = {"command": "recover", "perplexity": {"t": facts | {"pruned": 2.0, "recovered": 1.5}}}
    other = {"command": "recover", "perplexity": {"t": facts | {"pruned": 2.0, "recovered": 1.5, "seq_len": 5}}}
    assert "| t | 10 | 4 | 1.000 | 2.000 | 1.500 |" in account.figures([first, same])
    lines = account.figures([first, other])
    assert "| t | 10 | 4 | 1.000 | 2.000 |  |" in lines and "| t | 10 | 5 |  | 2.000 | 1.500 |" in lines
    cut_again = STEP | {"perplexity": {"t": facts | {"dense": 1.5, "pruned": 3.0}}}
    lines = account.figures([first, same, cut_again])
    assert "| perplexity | tokens | window | before this cut | pruned |" in lines
    assert "| t | 10 | 4 | 1.500 | 3.000 |" in lines
    assert account.NOT_AGAIN not in lines and account.NOT_AGAIN in account.figures([first, {"command": "export"}])


def test_results_that_are_not_ours_are_no_past(tmp_path):
    base = base_with(tmp_path, "")
    assert lineage.earlier(base) is None
    for text in ("{", "[]", '{"command": "train"}', '{"eval_loss": 1}'):
        (tmp_path / "results.json").write_text(text)
        assert lineage.earlier(base) is None
    (tmp_path / "results.json").write_text(json.dumps(STEP))
    assert lineage.earlier(base) == STEP


@pytest.fixture
def source(checkpoint_folder, tmp_path):
    """A checkpoint with much beside it."""
    folder = shutil.copytree(checkpoint_folder, tmp_path / "source")
    for name in ("LICENSE", "USE_POLICY.md", "chat_template.jinja", "training.json", "notes.txt", "train.py", "x.ckpt"):
        (folder / name).write_text("x")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("x")
    return folder


def test_the_same_files_go_along_whether_the_model_is_loaded_or_not(source, tmp_path):
    base = checkpoint.load(source)
    first = discover(base.model).of_kinds(["ffn_channel"])[0]
    plan = PruningPlan({first.name: tuple(range(first.units - 8))}, {first.name: first.units})
    for name in ("loaded", "streamed"):
        (tmp_path / name).mkdir()
    checkpoint.write(make("llama"), tmp_path / "loaded", tokenizer=base.tokenizer, base=base)
    checkpoint.cut_streaming(source, plan, tmp_path / "streamed", progress=False)
    loaded, streamed = (
        {str(f.relative_to(tmp_path / n)) for f in (tmp_path / n).rglob("*")} for n in ("loaded", "streamed")
    )
    assert loaded == streamed - {"modeling_per_layer.py"}
    assert {"LICENSE", "USE_POLICY.md", "chat_template.jinja", "additional_chat_templates/tools.jinja"} < loaded
    assert not {"training.json", "notes.txt", "train.py", "x.ckpt", "README.md"} & loaded
    assert (tmp_path / "loaded" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(("per_layer", "flags"), [(False, 0), (True, 2)])
def test_code_that_comes_along_is_trusted_for_model_and_tokenizer(per_layer, flags, tmp_path):
    folder = checkpoint.save(pruned(per_layer), tmp_path / "out")
    assert (folder / "README.md").read_text().count("trust_remote_code=True") == flags


def test_code_goes_along_if_the_tokenizer_names_it(source):
    (source / "modeling_per_layer.py").write_text("x")
    assert not [file for file in lineage.files_beside(source) if file.suffix == ".py"]
    settings = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps(settings | {"auto_map": {"AutoTokenizer": ["train.T"]}}))
    assert [file.name for file in lineage.files_beside(source) if file.suffix == ".py"] == ["train.py"]
