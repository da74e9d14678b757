"""`unicl-eval retrieval`."""

from dataclasses import dataclass

from ..numbers import OneDataSet
from .command import BesideBaselines


@dataclass(frozen=True, kw_only=True)
class Retrieval(BesideBaselines):
    """Caption retrieval in both directions: recall at 1, 5 and 10, with intervals and chance.

    An image counts as found by any of its captions among the first k.
    """

    data: OneDataSet
    """Images with captions: a packed data set (a folder or a URL), or any source of unicl-pack
    build, such as a list."""

    def run(self) -> None:
        from unicl_fast.evaluation.baselines import recalls
        from unicl_fast.evaluation.data import open_data
        from unicl_fast.evaluation.retrieval import (
            RetrievalFeatures,
            RetrievalResult,
            encode_captioned,
        )
        from unicl_fast.training.data import log_cut_captions

        from .figures import draw_found

        with (
            self.model() as on_ranks,
            open_data(self.data, ranks=on_ranks.ranks, takes_loose=True) as data,
        ):
            log_cut_captions(data.dataset, on_ranks.model.config.model.context_length)
            found = encode_captioned(on_ranks, data.dataset)
            result = on_ranks.on_rank_0(RetrievalFeatures.ranked, found, RetrievalResult)
            if found is None:
                return
            print(table := result.to_table())
            if self.figures is not None:
                draw_found(found, data.dataset, self.figures)
        ours = recalls(result.text_to_image)
        values, text = self.beside(
            on_ranks.model, self.data, ours=ours, kind="captions", features=found
        )
        if text:
            print(f"\n{text}")
        described = {"data": self.data, "name": data.name}
        self.write(described | result.to_json() | values, table)
