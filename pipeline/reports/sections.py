"""The sections of a report, and the files beside the page."""

from collections.abc import Iterator

import numpy as np

from pipeline.embeddings import summary
from pipeline.formats import png as png_lib
from pipeline.formats import projector, tf_example
from pipeline.reports import examples, latent_space, plots, scatter
from pipeline.reports import page as report_page
from pipeline.reports.data import ReportData
from pipeline.reports.page import ClassLosses, Section

# Decoded points of 2 latents: points of a side of the grid, and the largest coordinate.
_GRID_POINTS, _GRID_REACH = 20, 3.0
_MAX_TRAVERSED, _TRAVERSAL = 16, np.linspace(-3, 3, 11)
_NUM_PRIOR, _PRIOR_SEED = 64, 0


class Report:
    """The sections of one report, and its plots."""

    def __init__(self, data: ReportData):
        """Prepares a report; `page` draws the plots."""
        self._data = data
        self._plots: dict[str, bytes] = {}  # Name -> PNG for plots/.
        self._script = ""

    def page(self) -> bytes:
        """report.html."""
        manifest, made_from = self._data.manifest, self._data.manifest["made_from"]
        records = manifest["records"]
        lead = (
            f"{records['read']:,} records read = {records['written']:,} written + "
            f"{records['quarantined']:,} quarantined; export {manifest['export_id']}"
        )
        sections = [section for section in self._sections() if section]
        return report_page.page(
            title=f"{made_from['name']}: {', '.join(made_from['split'])}",
            lead=lead,
            warnings=self._warnings(),
            sections=sections,
            script=self._script,
        )

    def _warnings(self) -> list[str]:
        warnings = list(self._data.manifest.get("drift", {}).get("warnings", ()))
        if self._data.num_missing:
            warnings.append(
                f"{self._data.num_missing:,} images that were exported could not be read any more"
            )
        return warnings

    def files(self) -> dict[str, bytes]:
        """The files beside the page; call `page` first, because it draws the plots."""
        contents = {f"plots/{name}.png": data for name, data in self._plots.items()}
        sample = self._data.projector_sample
        if sample:
            files = projector.files(
                sample.rows.ids,
                sample.rows.labels,
                sample.rows.columns["mean"],
                class_names=self._data.class_names,
                sprite=self._data.sprite,
            )
            contents |= {f"{projector.DIRECTORY}/{name}": data for name, data in files.items()}
        return contents

    def _sections(self) -> Iterator[Section | None]:
        yield examples.reconstructions(self._data, self._plots)
        yield examples.largest_losses(self._data, self._plots)
        yield self._class_losses()
        yield self._latent_space()
        yield self._decoded()
        yield self._prior()
        yield self._latents()
        yield examples.nearest(self._data)
        yield self._probes()
        yield self._losses()
        if "drift" in self._data.manifest:
            body = report_page.drift(self._data.manifest["drift"])
            yield Section("drift", "Drift", body)
        yield self._lineage()
        yield self._shards()

    def _class_losses(self) -> Section | None:
        """Quartiles of reconstruction_loss for each class."""
        sample = self._data.loss_sample
        if not sample or not self._data.is_labelled:
            return None
        losses = sample.rows.columns.get("reconstruction_loss")
        if losses is None:
            return None
        floors = [self._data.floors.get(sample.key(i), np.nan) for i in range(len(losses))]
        excess = losses - np.array(floors)
        classes = []
        for label in np.unique(sample.rows.labels).tolist():
            mask = sample.rows.labels == label
            quartiles = tuple(map(float, np.percentile(losses[mask], (25, 50, 75))))
            excesses = excess[mask & ~np.isnan(excess)]
            above = float(np.median(excesses)) if len(excesses) else None
            name = self._data.class_name(label)
            classes.append(ClassLosses(name, int(mask.sum()), quartiles, above))
        body = report_page.class_losses(classes)
        return Section("class-losses", "reconstruction_loss by class", body)

    def _latent_space(self) -> Section | None:
        if not self._data.sample:
            return None
        rows = self._data.sample.rows
        maps = latent_space.maps(rows.columns["mean"], rows.labels)
        if not maps:
            note = "No map: there are fewer than three embeddings, or all are the same."
            return Section("latent-space", "Latent space", report_page.text(note))
        figures = []
        for latent_map in maps:
            plot = plots.scatter(latent_map, self._data.class_names)
            self._plots[latent_map.name] = plot.light
            title, count = latent_map.title, len(latent_map.labels)
            num_classes = len(np.unique(latent_map.labels))
            alt = f"Scatter plot: {title} of {count:,} embeddings"
            caption = f"{title} of a sample of {count:,} records"
            if self._data.is_labelled:
                alt, caption = f"{alt} in {num_classes} classes", f"{caption}, coloured by class"
            figures.append((plot, alt, caption, latent_map.name))
        data = scatter.data(
            maps, rows, class_name=self._data.class_name, sprite=self._data.thumbnails
        )
        self._script = scatter.script()
        return Section("latent-space", "Latent space", data + report_page.plots(*figures))

    def _decoded(self) -> Section | None:
        """A grid of decoded points for 2 latents, or traversals for more."""
        model = self._data.model
        if not model:
            return None
        if model.latent_dim == 2:
            line = np.linspace(-_GRID_REACH, _GRID_REACH, _GRID_POINTS)
            # The first latent is the x axis, the second is the y axis.
            z = np.array([[x, y] for y in line[::-1] for x in line])
            png = png_lib.grid(self._decode(z), num_columns=_GRID_POINTS, gap=0)
            self._plots["decoded_grid"] = png
            reach = f"from −{_GRID_REACH:g} to {_GRID_REACH:g}"
            caption = f"Horizontal axis: latent 0 {reach}. Vertical axis: latent 1 {reach}."
            alt = "Images decoded from a grid of points around the origin of the latent space"
            body = report_page.sheet(png, alt, caption)
            return Section("decoded-grid", "Decoded grid of latents", body)
        by_kl = self._by_kl(model.latent_dim)[:_MAX_TRAVERSED]
        z = np.zeros((len(by_kl), len(_TRAVERSAL), model.latent_dim))
        for row, latent in enumerate(by_kl):
            z[row, :, latent] = _TRAVERSAL
        pixels = self._decode(z.reshape(-1, model.latent_dim))
        png = png_lib.grid(pixels, num_columns=len(_TRAVERSAL))
        self._plots["traversals"] = png
        caption = (
            f"Each row is a latent, in order of decreasing kl: {', '.join(map(str, by_kl))}. From "
            "left to right its value goes from −3 to 3, and all other latents are 0."
        )
        alt = f"Decoded images along each of {len(by_kl)} latents"
        return Section("traversals", "Latent traversals", report_page.sheet(png, alt, caption))

    def _by_kl(self, latent_dim: int) -> list[int]:
        latents = self._data.summary.get("latents") or [{}] * latent_dim
        return sorted(range(latent_dim), key=lambda i: (-latents[i].get("kl", 0.0), i))

    def _decode(self, z: np.ndarray) -> np.ndarray:
        return tf_example.to_pixels(self._data.model.decode(z.astype(np.float32)))

    def _prior(self) -> Section | None:
        if not self._data.model:
            return None
        shape = (_NUM_PRIOR, self._data.model.latent_dim)
        z = np.random.default_rng(_PRIOR_SEED).standard_normal(shape)
        png = png_lib.grid(self._decode(z))
        self._plots["prior_samples"] = png
        alt = f"{_NUM_PRIOR} images decoded from samples of the prior"
        caption = "Images decoded from z ~ N(0, 1)."
        body = report_page.sheet(png, alt, caption)
        return Section("prior-samples", "Samples from the prior", body)

    def _latents(self) -> Section | None:
        latents = self._data.summary.get("latents")
        if not latents:
            return None
        is_active = [latent["variance"] > summary.ACTIVE_VARIANCE for latent in latents]
        note = report_page.text(
            f"{sum(is_active)} of {len(is_active)} latents are active: the variance of their "
            f"posterior mean over the records is above {summary.ACTIVE_VARIANCE}."
        )
        if "kl" not in latents[0]:
            return Section("latents", "Active latents", note)
        kl = [latent["kl"] for latent in latents]
        plot = plots.bars(kl, is_active, size=(4.8, 3))
        self._plots["kl_per_latent"] = plot.light
        alt = f"Bar chart: kl of each of {len(kl)} latents, {min(kl):.2f} to {max(kl):.2f} nats"
        body = note + report_page.plots((plot, alt, "Mean kl of each latent over all records"))
        return Section("latents", "Active latents", body)

    def _probes(self) -> Section | None:
        if not self._data.sample or not self._data.is_labelled:
            return None
        rows, made_from = self._data.sample.rows, self._data.manifest["made_from"]
        splits = [
            next(s for s in made_from["split"] if task.startswith(f"{made_from['name']}-{s}."))
            for task in self._data.sample.tasks
        ]
        results = latent_space.accuracies(rows.columns["mean"], rows.labels, splits)
        note = report_page.text("Accuracy of classifiers that see only the embeddings.")
        return Section("probes", "Probes", note + report_page.accuracies(results))

    def _losses(self) -> Section | None:
        """Loss curves of the run that trained the model."""
        # Metric -> split -> [(epoch, value)].
        panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
        for name in ("loss", "reconstruction_loss", "kl"):
            for line in self._data.run_metrics:
                value = line.get(name)
                if line["split"] != "test" and isinstance(value, int | float):
                    curve = panels.setdefault(name, {}).setdefault(line["split"], [])
                    curve.append((line["epoch"], value))
        if not panels:
            return None
        figures = []
        for name, curves in panels.items():
            plot = plots.curves(name, curves, size=(4.8, 3.4))
            self._plots[f"curve_{name}"] = plot.light
            alt = f"Line chart of {name} over the epochs of training: {', '.join(curves)}"
            figures.append((plot, alt, f"{name} after each epoch, nats per image"))
        return Section("loss-curves", "Loss curves", report_page.plots(*figures))

    def _lineage(self) -> Section:
        manifest, made_from = self._data.manifest, self._data.manifest["made_from"]
        values = {
            "export_id": manifest["export_id"],
            "dataset_id": manifest["dataset_id"] or f"source {made_from['fingerprint'][:16]}…",
            "model_id": manifest["model_id"],
        }
        for key, value in made_from.items():
            is_long = key in ("fingerprint", "model_class_names")
            if key not in values and value not in (None, "") and not is_long:
                is_list = isinstance(value, list)
                values[key] = ", ".join(map(str, value)) if is_list else str(value)
        values |= {name: float(v) if isinstance(v, float) else v
                   for name, v in manifest["metrics"].items()}  # fmt: skip
        if self._data.model_manifest:
            config = self._data.model_manifest["config"]
            keys = ("latent_dim", "beta", "likelihood", "architecture", "precision", "seed")
            values["trained for"] = f"{self._data.model_manifest['step']:,} steps"
            values |= {f"config.{key}": str(config[key]) for key in keys if key in config}
        return Section("lineage", "Lineage", report_page.facts(values))

    def _shards(self) -> Section:
        shards = self._data.manifest["shards"]
        # Shards with the most quarantined records come first.
        tasks = sorted(shards, key=lambda task: -shards[task]["quarantined"])
        keys = ("read", "written", "quarantined")
        rows = [[task, *(shards[task][key] for key in keys)] for task in tasks]
        rows.insert(0, ["total", *(self._data.manifest["records"][key] for key in keys)])
        return Section("counts", "Record counts", report_page.table(("shard", *keys), rows))
