"""`unicl-eval zero-shot`."""

from dataclasses import dataclass
from typing import Any

from unicl_fast.evaluation.choices import MetricChoice

from .command import BesideBaselines


@dataclass(frozen=True, kw_only=True)
class ZeroShot(BesideBaselines):
    """Zero-shot classification: top-1, top-5 and mean per class, with 95 % intervals.

    Example: unicl-eval zero-shot --checkpoint runs/first --data packed/held-out class_folders/
    """

    data: tuple[str, ...]
    """Data sets, evaluated in turn: packed ones with labels (folders or URLs), folders or zips of
    class folders, or any other source of unicl-pack build."""
    class_names: tuple[str, ...] = ()
    """Names instead of the data's own: a file with one per line, imagenet, or clip-benchmark:KEY
    (from the extra `evaluation`), such as clip-benchmark:dtd. One for all data sets, or one for
    each; own keeps the data's."""
    templates: tuple[str, ...] = ()
    """Prompt templates instead of the data's own: a file with one per line, imagenet, simple, or
    clip-benchmark:KEY; one for all data sets or one for each, as above."""
    metric: tuple[MetricChoice, ...] = ("auto",)
    """The metric in the table of several data sets: one for all or one for each. auto follows
    CLIP's protocol by the data set's name: mean_per_class for pets, flowers, aircraft and
    caltech101, top1 for others."""
    hierarchy: bool = False
    """Also classify among the classes of each level of the data's hierarchy, and measure how far
    mistakes are off."""
    average_precision: bool = False
    """Also report the mean average precision of the classes (mAP), by sorting all images by
    similarity. For images with several labels, such as COCO's."""

    def check(self) -> None:
        for name in ("class_names", "templates", "metric"):
            self.for_each(name)
        super().check()
        from unicl_fast.training.data import distinct_names

        distinct_names(self.data)

    def for_each(self, name: str, default: str = "") -> list[Any]:
        """An option's values, one for each data set; own and none given mean `default`."""
        given = [default if one == "own" else one for one in getattr(self, name)] or [default]
        if len(given) not in (1, len(self.data)):
            raise ValueError(
                f"--{name.replace('_', '-')} needs one value for all data sets or one for each of "
                f"the {len(self.data)}, not {len(given)}"
            )
        return given * len(self.data) if len(given) == 1 else given

    def run(self) -> None:
        from unicl_fast.evaluation.baselines import top_1
        from unicl_fast.evaluation.report import classification_table
        from unicl_fast.evaluation.zero_shot import zero_shot
        from unicl_fast.training.data import distinct_names

        found = []
        names = distinct_names(self.data)
        options = {"class_names": "", "templates": "", "metric": "auto"}
        settings = {option: self.for_each(option, default) for option, default in options.items()}
        with self.model() as on_ranks:
            is_main = on_ranks.ranks.is_main
            for number, name in enumerate(names):
                one = zero_shot(
                    on_ranks,
                    self.data[number],
                    name=name,
                    hierarchy=self.hierarchy,
                    average_precision=self.average_precision,
                    **{option: values[number] for option, values in settings.items()},
                )
                found.append(one)
                if is_main:
                    print((f"\n{name}\n" if len(names) > 1 else "") + one.to_table())
        if not is_main:
            return
        beside = list[dict[str, Any]]()
        for data, one, given in zip(self.data, found, settings["class_names"], strict=True):
            values, text = self.beside(
                on_ranks.model, data, ours=top_1(one.classes), kind="labels", class_names=given
            )
            beside.append(values)
            if text:
                print(f"\n{one.name}:", text, sep="\n" if "\n" in text else " ")
        rows = [row for one in found for row in one.rows()]
        table = classification_table(rows)
        each = [
            {"data": data} | one.to_json() | values
            for data, one, values in zip(self.data, found, beside, strict=True)
        ]
        if len(found) == 1:
            self.write(each[0], table)
        else:
            print(f"\n{table}")
            mean = sum(result.value(metric) for _, metric, result in rows) / len(rows)
            self.write({"mean": mean, "data_sets": each}, table)
        for name, _, result in rows:
            self.draw(result, name.replace(", ", "-"), title=f"{name}, zero-shot")
