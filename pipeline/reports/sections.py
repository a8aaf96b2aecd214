"""The sections of a report, and the files beside the page."""

from collections.abc import Iterator

import numpy as np

from pipeline.embeddings import summary
from pipeline.formats import png as png_lib
from pipeline.formats import projector, tf_example
from pipeline.reports import latent_space, plots
from pipeline.reports import page as report_page
from pipeline.reports.data import NUM_PAIRS, ReportData
from pipeline.reports.page import Section, Tile

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

    def page(self) -> bytes:
        """report.html."""
        manifest, made_from = self._data.manifest, self._data.manifest["made_from"]
        records = manifest["records"]
        lead = (
            f"{records['read']:,} records read = {records['written']:,} written + "
            f"{records['quarantined']:,} quarantined; export {manifest['export_id']}"
        )
        return report_page.page(
            title=f"{made_from['name']}: {', '.join(made_from['split'])}",
            lead=lead,
            warnings=self._warnings(),
            sections=[section for section in self._sections() if section],
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
        yield self._reconstructions()
        yield self._largest_losses()
        yield self._latent_space()
        yield self._decoded()
        yield self._prior()
        yield self._latents()
        yield self._nearest()
        yield self._probes()
        yield self._losses()
        if "drift" in self._data.manifest:
            body = report_page.drift(self._data.manifest["drift"])
            yield Section("drift", "Drift", body)
        yield self._lineage()
        yield self._shards()

    def _reconstructions(self) -> Section | None:
        if not self._data.sample or not self._data.model:
            return None
        sample, images = self._data.sample, self._data.images
        candidates = range(min(NUM_PAIRS, len(sample.tasks)))
        rows = [row for row in candidates if sample.key(row) in images]
        if not rows:
            return None
        originals = np.stack([images[sample.key(row)] for row in rows])
        pictures = tf_example.to_pixels(self._data.model.reconstruct(originals))
        self._plots["reconstructions"] = png_lib.contact_sheet(originals, pictures)
        tiles = []
        for row, original, picture in zip(rows, originals, pictures, strict=True):
            name = self._data.class_name(int(sample.rows.labels[row]))
            alt = f"{sample.rows.ids[row]} above its reconstruction"
            tiles.append(Tile((original, picture), name, alt))
        note = report_page.text(
            "Each original is above its reconstruction by the model,",
            f"which has latent_dim = {self._data.model.latent_dim}.",
        )
        body = note + report_page.tiles(tiles)
        return Section("reconstructions", "Originals and reconstructions", body)

    def _largest_losses(self) -> Section | None:
        if not self._data.worst:
            return None
        images, title = self._data.images, "Largest reconstruction_loss"
        worst = [row for row in self._data.worst if (row[3], row[1]) in images]
        is_labelled, has_floor = self._data.is_labelled, len(self._data.worst[0]) > 4
        which = "Images with the largest reconstruction_loss"
        if has_floor:
            which = (
                "Images whose reconstruction_loss is furthest above the entropy of their pixels, "
                "which no Bernoulli loss is below"
            )
        ending = ". They may be unusual or damaged."
        if is_labelled:
            ending = ", with their labels. They may be unusual, damaged or mislabelled."
        note = report_page.text(which + ending)
        if not worst:
            rows = [
                [record_id, *([self._data.class_name(label)] if is_labelled else []), loss, *excess]
                for loss, record_id, label, _, *excess in self._data.worst
            ]
            columns = ["id", *(["label"] if is_labelled else []), "reconstruction_loss"]
            columns += ["above the entropy"] if has_floor else []
            body = note + report_page.table(columns, rows)
            return Section("largest-losses", title, body)
        originals = np.stack([images[row[3], row[1]] for row in worst])
        columns = [(original,) for original in originals]
        if self._data.model:
            pictures = tf_example.to_pixels(self._data.model.reconstruct(originals))
            columns = list(zip(originals, pictures, strict=True))
            self._plots["largest_losses"] = png_lib.contact_sheet(originals, pictures)
        tiles = []
        for (loss, record_id, label, _, *excess), column in zip(worst, columns, strict=True):
            name = self._data.class_name(label)
            labelled = f", labelled {name}" if name else ""
            alt = f"{record_id}{labelled}, reconstruction_loss {loss:.1f} nats"
            alt += "".join(f", {nats:.1f} above the entropy" for nats in excess)
            shown = f"{(excess or [loss])[0]:.0f}"
            tiles.append(Tile(column, f"{shown}{': ' if name else ''}{name}", alt))
        return Section("largest-losses", title, note + report_page.tiles(tiles))

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
            caption = f"{title}: a sample of {count:,} records"
            if self._data.is_labelled:
                alt, caption = f"{alt} in {num_classes} classes", f"{caption}, coloured by class"
            figures.append((plot, alt, caption))
        return Section("latent-space", "Latent space", report_page.plots(*figures))

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

    def _nearest(self) -> Section | None:
        if not self._data.neighbours:
            return None
        rows, tiles = self._data.sample.rows, []
        for query, *neighbours in self._data.neighbours:
            query_id = rows.ids[query]
            for row in (query, *neighbours):
                record_id, name = rows.ids[row], self._data.class_name(int(rows.labels[row]))
                image = self._data.images.get(self._data.sample.key(row))
                if image is None:
                    continue
                alt, caption = ", ".join(filter(None, (record_id, name))), f"{name or 'query'}:"
                if row != query:
                    alt, caption = f"{alt}, near {query_id}", name
                tiles.append(Tile((image,), caption, alt))
        if not tiles:
            table = [
                [rows.ids[query], ", ".join(rows.ids[row] for row in neighbours)]
                for query, *neighbours in self._data.neighbours
            ]
            body = report_page.table(("id", "nearest"), table)
        else:
            body = report_page.tiles(tiles, num_columns=max(map(len, self._data.neighbours)))
        note = report_page.text(
            "Each row shows a record, then the records with the nearest embeddings",
            f"in a sample of {len(rows.ids):,}.",
        )
        return Section("neighbours", "Nearest neighbours", note + body)

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
