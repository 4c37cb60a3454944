"""What a text of the study is made of: files of packages at fixed versions, each in one split."""

import dataclasses
import hashlib
import json

from stem_jax.errors import InputError

SPLITS = ("test", "dev", "train")
KINDS = ("prose", "code")


@dataclasses.dataclass(frozen=True)
class Package:
    """A source archive of a package, as the Python package index keeps it.

    split: that all its documents belong to: test, dev or train.
    name, version: of the package. licence: an SPDX expression, as the package states it.
    take: patterns of the paths in it that are read, below its top folder; * crosses folders.
    file: name of the archive. sha256: of its bytes.
    """

    split: str
    name: str
    version: str
    licence: str
    take: tuple[str, ...]
    file: str
    sha256: str


@dataclasses.dataclass(frozen=True)
class TextRecipe:
    """A text.

    kind: prose or code, which says what of a file is text and which files are none.
    packages: in the order in which their documents come.
    """

    kind: str
    packages: tuple[Package, ...]

    def check(self, name: str) -> None:
        """Raises InputError for a split that is unknown, two splits of a package, or none."""
        if self.kind not in KINDS:
            raise InputError(f"text {name} is of kind {self.kind!r}: use one of {', '.join(KINDS)}")
        split_of: dict[str, str] = {}
        for package in self.packages:
            if package.split not in SPLITS:
                raise InputError(
                    f"package {package.name} of text {name} has split {package.split!r}: use one of"
                    f" {', '.join(SPLITS)}"
                )
            if split_of.setdefault(package.name.lower(), package.split) != package.split:
                raise InputError(
                    f"package {package.name} of text {name} is in two splits: choose one, as a"
                    " split is of whole packages"
                )
        missing = [split for split in SPLITS if split not in split_of.values()]
        if missing:
            raise InputError(f"text {name} has no package for {missing[0]}: give it one")

    @property
    def digest(self) -> str:
        """sha256 (hex) of all that the recipe says."""
        return hashlib.sha256(json.dumps(dataclasses.asdict(self)).encode()).hexdigest()
