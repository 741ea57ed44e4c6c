"""The card of a result: what the Hub reads in it, what it says, and that strangers' words stay words."""

import dataclasses
import json
import re
from collections.abc import Iterator

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from markdown_it.token import Token

from hqq_core import Checkpoint, Provenance, Recipe, output_folders, quantize_checkpoint, verify_folder
from hqq_core.card import card_of_several
from hqq_core.checkpoint import MANIFEST, REPORT
from hqq_core.errors import SpecError
from hqq_core.formats import FORMATS
from hqq_core.results import Manifest
from tests.checkpoints import folder_bytes
from tests.fakehub.card import LICENSES, check_card

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ORIGIN = Provenance(repo_id="team-a/Model-1B", commit=COMMIT)
EVERY = [
    Recipe(format=name, energy="none", **({"nbits": 1.58, "group_size": None} if name == "bitnet" else {}))
    for name in FORMATS
]


def card_in(folder) -> ModelCard:
    """As the Hub's client reads it, after the checks that the Hub makes."""
    text = (folder / "README.md").read_text()
    assert check_card(text) == ([], [])
    return ModelCard(text)


def made(source, folder, recipe=None, **settings) -> ModelCard:
    quantize_checkpoint(source, folder, recipe or Recipe(energy="none"), **settings)
    return card_in(folder)


class TestMetadata:
    @pytest.mark.parametrize("recipe", EVERY, ids=list(FORMATS))
    def test_every_format(self, save, tmp_path, recipe):
        source = save(
            card="---\nlicense: apache-2.0\nlanguage:\n- en\n- no\n---\n# A model\n", ternary=recipe.format == "bitnet"
        )
        data = made(source, tmp_path / "out", recipe, provenance=ORIGIN).data.to_dict()
        assert (data["base_model"], data["base_model_relation"]) == ("team-a/Model-1B", "quantized")
        assert data["library_name"] == FORMATS[recipe.format].capabilities.library
        assert data["pipeline_tag"] == "text-generation"
        assert (data["license"], data["language"]) == ("apache-2.0", ["en", "no"])
        assert {"halfquad", f"{recipe.nbits:g}-bit", recipe.format} <= set(data["tags"])
        assert ("hqq" in data["tags"]) is (recipe.format != "bitnet")
        verify_folder(tmp_path / "out")

    def test_the_hubs_client_has_it_validated(self, save, tmp_path, fakehub, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", fakehub.endpoint)
        card = made(save(card="---\nlicense: my-own\n---\n"), tmp_path / "out", provenance=ORIGIN)
        card.validate()
        with pytest.raises(ValueError, match="my-own"):
            ModelCard((tmp_path / "out" / "SOURCE_README.md").read_text()).validate()

    def test_a_local_folder_is_no_base_model(self, save, tmp_path):
        data = made(save(), tmp_path / "out").data.to_dict()
        assert set(data) == {"library_name", "pipeline_tag", "tags"}

    @pytest.mark.parametrize(
        ("said", "taken"),
        [
            ("license: mit", {"license": "mit"}),
            ("license: MIT", {"license": "mit"}),
            ("license: [mit, apache-2.0]", {"license": ["mit", "apache-2.0"]}),
            ("license: my-own", {"license": "other", "license_name": "my-own"}),
            ("license: other\nlicense_name: qwen", {"license": "other", "license_name": "qwen"}),
            ("license: other\nlicense_link: https://x.org/a", {"license": "other", "license_link": "https://x.org/a"}),
            ("license: other\nlicense_link: LICENSE", {"license": "other", "license_link": "LICENSE"}),
            ("license: other\nlicense_link: GONE", {"license": "other"}),
            ("license: other\nlicense_link: javascript:alert(1)", {"license": "other"}),
            ("license_link: https://x.org/a", {}),
            ("license: null", {}),
            ("license: {a: b}", {}),
            ("license: [[mit], {a: b}]", {}),
            ("license: !!python/object/apply:os.system ['touch x']", {}),
            ("language: EN", {}),
            ("language: [en, 7, [de], fr]", {"language": ["en", "fr"]}),
            ("pipeline_tag: feature-extraction", {"pipeline_tag": "feature-extraction"}),
            ('pipeline_tag: "a\\nb"', {}),
            ("tags: [nsfw]\nlibrary_name: evil\nbase_model: a/b\nbase_model_relation: merge", {}),
        ],
    )  # fmt: skip
    def test_sound_values_of_the_sources_card_are_taken_over(self, save, tmp_path, said, taken):
        source = save(card=f"---\n{said}\n---\n# A model\n")
        (source / "LICENSE").write_text("terms")
        data = made(source, tmp_path / "out").data.to_dict()
        tags = data.pop("tags")
        assert data == {"library_name": "transformers", "pipeline_tag": "text-generation"} | taken
        assert tags == ["halfquad", "hqq", "4-bit", "compressed-tensors"]

    @pytest.mark.parametrize(
        ("architecture", "task"),
        [
            ("Qwen3ForCausalLM", "text-generation"), ("GPT2LMHeadModel", "text-generation"), ("BertModel", "feature-extraction"),
            ("BertForMaskedLM", "fill-mask"), ("XForSequenceClassification", "text-classification"), ("Strange", None),
            ("A\n```\n[x](https://evil.example)", None), (7, None),
        ],
    )  # fmt: skip
    def test_the_task_follows_from_the_architecture(self, save, tmp_path, architecture, task):
        card = made(save(architectures=[architecture]), tmp_path / "out")
        assert card.data.pipeline_tag == task
        assert "evil" not in card.content

    def test_licences_are_those_of_the_hub(self):
        from hqq_core.card._licenses import LICENSES as ours

        assert ours == LICENSES


BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30))
MERGES = "a0: &a0 {x: y}\n" + "".join(f"a{i}: &a{i}\n  <<: [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30))


class TestHostileCards:
    @pytest.mark.parametrize(
        "card",
        [
            f"---\n{BOMB}license: mit\n---\n", f"---\n{MERGES}license: mit\n---\n", f"---\n{'[' * 200_000}\n---\n",
            f"---\nlicense: {'x' * 2_000_000}\n---\n", "---\nlicense: mit\n", "---\n- license\n---\n", "---\n? [a]\n: b\n---\n",
            "---\nlicense: 'mit\n---\n", '---\nlicense: "\\UFFFFFFFF"\n---\n', "---\n---\n", "", b"\xff\xfe---\n\x00\n---\n",
            f"---\nlanguage: [{'en-a, ' * 30_000}en]\n---\n",
        ],
        ids=["bomb", "merges", "deep", "huge", "open", "list", "key", "quote", "character", "empty", "none", "bytes", "many"],
    )  # fmt: skip
    def test_do_no_harm(self, save, tmp_path, card):
        card = made(save(card=card), tmp_path / "out")
        assert card.data.license is None
        assert len(card.content) < 10_000

    @pytest.mark.parametrize(
        "name",
        [
            "[click](https:¦¦evil.example)", "![x](y)", "<script>alert(1)", "<https:evil.example>", "a`b`c|d", "*a* _b_ ~~c~~",
            "# a\n# b\n---\nlicense: mit", "a\u202eb", "&lt;", "\\",
        ],
    )  # fmt: skip
    def test_names_stay_names(self, save, tmp_path, name):
        card = made(save(), tmp_path / "out", provenance=Provenance(folder=name))
        assert card.data.license is None
        plain = made(save("plain"), tmp_path / "plain-out").text
        found = list(tokens_of(card.text))
        assert [(token.type, token.tag) for token in found] == [(token.type, token.tag) for token in tokens_of(plain)]
        title = next(token.content for token in found if token.type == "text")
        assert title.startswith(name.replace("\n", " ").replace("\u202e", " "))

    def test_what_looks_like_an_address_does_not_become_a_link(self, save, tmp_path):
        """As GitHub-flavoured Markdown would make of it, which the Hub renders."""
        card = made(save(), tmp_path / "out", provenance=Provenance(folder="www.evil.example"))
        assert "www.evil" not in re.sub(r"`[^`\n]*`", "", card.text)

    def test_module_names_of_a_recipe_stay_names(self, save, tmp_path):
        recipe = Recipe(energy="none", skip_modules=("model.layers.0.self_attn.q_proj",))
        assert "`model.layers.0.self_attn.q_proj`" in made(save(), tmp_path / "out", recipe).text

    @pytest.mark.parametrize("repo_id", ["a b", "a/b/c", '"; rm -rf ~; "', "a/$(id)", "", "../x"])
    def test_what_is_no_repository_gets_into_no_snippet(self, save, tmp_path, repo_id):
        with pytest.raises(SpecError, match="repo_id .*: wanted NAME or OWNER/NAME"):
            quantize_checkpoint(save(), tmp_path / "out", Recipe(energy="none"), repo_id=repo_id)
        assert not (tmp_path / "out").exists()


class TestTable:
    def test_sizes_and_errors_are_those_of_the_report(self, save, tmp_path):
        card = made(save(), tmp_path / "out")
        rows = {cells[0]: cells for cells in cells_of(card.text)}
        assert list(rows)[2:] == [
            "q",
            "k",
            "v",
            "o",
            "gate",
            "up",
            "down",
            "embeddings",
            "output head",
            "norms",
            "**all**",
        ]
        report = json.loads((tmp_path / "out" / REPORT).read_text())["tensors"]
        for group in ("q", "down"):
            own = [tensor for tensor in report if f".{group}_proj." in tensor["name"]]
            error, norm = (sum(tensor[key] for tensor in own) for key in ("squared_error", "squared_norm"))
            assert rows[group][1] == str(len(own))
            assert rows[group][5] == f"{(error / norm) ** 0.5:.4f}"
            bits = 8 * sum(tensor["nbytes_out"] for tensor in own) / sum(tensor["nbytes_in"] for tensor in own) * 2
            assert rows[group][4] == f"{bits:.2f}"
        assert rows["norms"][1:2] + rows["norms"][4:] == ["5", "16.00", "copied"]
        assert rows["**all**"][1] == str(len(report))

    def test_what_is_skipped_has_a_row_of_its_own(self, save, tmp_path):
        recipe = Recipe(energy="none", skip_modules=("layers.0.self_attn.q_proj",))
        rows = [cells for cells in cells_of(made(save(), tmp_path / "out", recipe).text) if cells[0] == "q"]
        assert [(row[1], row[5] == "copied") for row in rows] == [("1", False), ("1", True)]


def tokens_of(text: str) -> Iterator[Token]:
    """What Markdown makes of it; runs of text, which escapes cut up, as one."""
    for block in MarkdownIt("commonmark").enable("table").parse(text):
        yield from block.children or [block]


def cells_of(text: str) -> list[list[str]]:
    section = text.split("## Size and error")[1].split("##")[0]
    return [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("|")]


class TestProvenance:
    def test_it_is_in_the_manifest_and_the_card(self, save, tmp_path):
        card = made(save(), tmp_path / "out", provenance=dataclasses.replace(ORIGIN, job_id="01JOB"))
        said = json.loads((tmp_path / "out" / MANIFEST).read_text())["provenance"]
        assert (said["repo_id"], said["commit"], said["job_id"]) == ("team-a/Model-1B", COMMIT, "01JOB")
        assert said["folder"] is None
        assert said["recipe"] == Recipe(energy="none").to_dict()
        assert set(said["versions"]) == {"halfquad", "torch", "numba", "numpy"}
        assert COMMIT in card.text
        assert f"torch {said['versions']['torch']}" in card.text

    def test_of_a_local_folder_the_name_alone_is_told(self, save, tmp_path):
        made(save(), tmp_path / "out")
        manifest = Manifest.from_dict(json.loads((tmp_path / "out" / MANIFEST).read_text()))
        assert manifest.provenance
        assert manifest.provenance.folder == "source"
        assert all(str(tmp_path).encode() not in content for content in folder_bytes(tmp_path / "out").values())

    def test_another_job_on_the_same_source_changes_the_manifest_alone(self, save, tmp_path):
        source = save()
        for job in ("01A", "01B"):
            made(source, tmp_path / job, provenance=dataclasses.replace(ORIGIN, job_id=job))
        one, two = folder_bytes(tmp_path / "01A"), folder_bytes(tmp_path / "01B")
        assert {name for name in one if one[name] != two[name]} == {MANIFEST}

    def test_manifests_from_before_are_read(self, save, tmp_path):
        made(save(), tmp_path / "out")
        fields = json.loads((tmp_path / "out" / MANIFEST).read_text())
        del fields["provenance"]
        (tmp_path / "out" / MANIFEST).write_text(json.dumps(fields))
        assert Manifest.from_dict(fields).provenance is None
        verify_folder(tmp_path / "out", Checkpoint.open(tmp_path / "source"))

    @pytest.mark.parametrize("said", [{"repo_id": 7}, {"versions": [1]}, {"recipe": "x"}, {"versions": {"torch": 2}}])
    def test_what_is_of_another_type_is_refused(self, said):
        with pytest.raises(TypeError, match="provenance: .* wanted"):
            Provenance.from_dict(said)


class TestSeveral:
    RECIPES = (Recipe(format="mlx", energy="none"), Recipe(format="awq", energy="none"))

    @pytest.mark.parametrize("repo_id", [None, "team-a/quantized"])
    def test_the_card_at_the_root_tells_of_the_folders(self, save, tmp_path, repo_id):
        source = save(card="---\nlicense: mit\n---\n")
        settings = {"provenance": ORIGIN, "repo_id": repo_id}
        manifests = quantize_checkpoint(source, tmp_path / "out", *self.RECIPES, **settings)
        folders = output_folders(self.RECIPES)
        text = card_of_several(tmp_path / "out", folders, repo_id=repo_id).decode()
        assert check_card(text) == ([], [])
        data = ModelCard(text).data.to_dict()
        assert data == {
            "base_model": "team-a/Model-1B", "base_model_relation": "quantized", "pipeline_tag": "text-generation",
            "license": "mit", "tags": ["halfquad", "hqq", "4-bit", "mlx", "awq"],
        }  # fmt: skip
        for folder, manifest in zip(folders, manifests, strict=True):
            assert f"[{folder}]({folder}/README.md)" in text
            assert f"{manifest.metrics['relative_error']:.4f}" in text
            inner = card_in(tmp_path / "out" / folder).text
            assert (f'hf download {repo_id} --include "{folder}/*"' in inner) is (repo_id is not None)
            assert f'"{folder if repo_id else "."}"' in inner
