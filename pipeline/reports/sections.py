"""What stands in a report, section by section, and the files beside it."""

from collections.abc import Iterator

import numpy as np

from pipeline.embeddings import summary
from pipeline.formats import png as png_lib
from pipeline.formats import tf_example
from pipeline.reports import latent_space, plots, projector
from pipeline.reports import page as report_page
from pipeline.reports.data import NUM_PAIRS, ReportData
from pipeline.reports.page import Section, Tile

# The chart of decoded points: so many a side, so far from the origin.
_GRID_POINTS, _GRID_REACH = 20, 3.0
_MAX_TRAVERSED, _TRAVERSAL = 16, np.linspace(-3, 3, 11)
_NUM_PRIOR, _PRIOR_SEED = 64, 0


class Report:
    """The sections of a report, and the plots that are drawn on the way."""

    def __init__(self, data: ReportData):
        """Takes what has been read."""
        self._data = data
        self._plots: dict[str, bytes] = {}

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
        found = list(self._data.manifest.get("drift", {}).get("warnings", ()))
        if self._data.num_missing:
            found.append(
                f"{self._data.num_missing:,} images that were exported could not be read any more"
            )
        return found

    def files(self) -> dict[str, bytes]:
        """The files beside the page; after `page`, which draws the plots."""
        found = {f"plots/{name}.png": data for name, data in self._plots.items()}
        if self._data.bundled:
            bundle = projector.files(self._data.bundled, self._data.names(), self._data.sprite)
            found |= {f"{projector.DIRECTORY}/{name}": data for name, data in bundle.items()}
        return found

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
            drift = report_page.drift(self._data.manifest["drift"])
            yield Section("drift", "Drift", drift)
        yield self._lineage()
        yield self._shards()

    def _reconstructions(self) -> Section | None:
        if not self._data.points or not self._data.model:
            return None
        points, images = self._data.points, self._data.images
        first = range(min(NUM_PAIRS, len(points.tasks)))
        shown = [i for i in first if points.key(i) in images]
        if not shown:
            return None
        originals = np.stack([images[points.key(i)] for i in shown])
        pictures = tf_example.to_pixels(self._data.model.reconstruct(originals))
        self._plots["reconstructions"] = png_lib.contact_sheet(originals, pictures)
        found = []
        for i, original, picture in zip(shown, originals, pictures, strict=True):
            name = self._data.name_of(int(points.rows.labels[i]))
            alt = f"{points.rows.ids[i]} above its reconstruction"
            found.append(Tile((original, picture), name, alt))
        note = report_page.text(
            "Each image above what the model makes of its embedding of",
            f"latent_dim = {self._data.model.latent_dim}.",
        )
        body = note + report_page.tiles(found)
        return Section("reconstructions", "Originals and reconstructions", body)

    def _largest_losses(self) -> Section | None:
        if not self._data.worst:
            return None
        images = self._data.images
        there = [worst for worst in self._data.worst if (worst[3], worst[1]) in images]
        note = report_page.text(
            "Images that the model finds hardest to describe, with their labels: odd, damaged, "
            "perhaps mislabelled."
        )
        if not there:
            rows = [[i, self._data.name_of(label), loss] for loss, i, label, _ in self._data.worst]
            body = note + report_page.table(("id", "label", "reconstruction_loss"), rows)
            return Section("largest-losses", "Largest reconstruction_loss", body)
        originals = np.stack([images[task, i] for _, i, _, task in there])
        below = [()] * len(there)
        if self._data.model:
            pictures = tf_example.to_pixels(self._data.model.reconstruct(originals))
            below = [(picture,) for picture in pictures]
            self._plots["largest_losses"] = png_lib.contact_sheet(originals, pictures)
        found = []
        for (loss, i, label, _), original, under in zip(there, originals, below, strict=True):
            name = self._data.name_of(label)
            alt = f"{i}, labelled {name}, reconstruction_loss {loss:.1f} nats"
            found.append(Tile((original, *under), f"{loss:.0f}: {name}", alt))
        body = note + report_page.tiles(found)
        return Section("largest-losses", "Largest reconstruction_loss", body)

    def _latent_space(self) -> Section | None:
        if not self._data.points:
            return None
        rows = self._data.points.rows
        maps = latent_space.maps(rows.columns["mean"], rows.labels)
        if not maps:
            note = "No map: the embeddings are all the same, or fewer than three."
            return Section("latent-space", "Latent space", report_page.text(note))
        shown = []
        for found in maps:
            plot = plots.scatter(found, self._data.names())
            self._plots[found.name] = plot.light
            count, classes = len(found.labels), len(np.unique(found.labels))
            alt = f"Scatter plot: {found.title} of {count:,} embeddings in {classes} classes"
            shown.append(
                (plot, alt, f"{found.title}: a sample of {count:,} records, coloured by class")
            )
        return Section("latent-space", "Latent space", report_page.plots(*shown))

    def _decoded(self) -> Section | None:
        """The chart of decoded points of 2 latents, or traversals of more."""
        model = self._data.model
        if not model:
            return None
        if model.latent_dim == 2:
            line = np.linspace(-_GRID_REACH, _GRID_REACH, _GRID_POINTS)
            # As in a coordinate system: the first latent to the right, the second upwards.
            z = np.array([[x, y] for y in line[::-1] for x in line])
            png = png_lib.grid(self._decode(z), num_columns=_GRID_POINTS, gap=0)
            self._plots["decoded_grid"] = png
            reach = f"from −{_GRID_REACH:g} to {_GRID_REACH:g}"
            caption = f"Latent 0 {reach} to the right, latent 1 {reach} upwards."
            alt = "Chart of decoded points on a grid around the origin of the latent space"
            body = report_page.sheet(png, alt, caption)
            return Section("decoded-grid", "Decoded points around the origin", body)
        by_kl = self._by_kl(model.latent_dim)[:_MAX_TRAVERSED]
        z = np.zeros((len(by_kl), len(_TRAVERSAL), model.latent_dim))
        for row, latent in enumerate(by_kl):
            z[row, :, latent] = _TRAVERSAL
        pixels = self._decode(z.reshape(-1, model.latent_dim))
        png = png_lib.grid(pixels, num_columns=len(_TRAVERSAL))
        self._plots["traversals"] = png
        caption = (
            "A row a latent, by falling kl: "
            f"{', '.join(map(str, by_kl))}. From left to right it goes from −3 to 3 while all "
            "others are 0."
        )
        alt = f"Decoded images along each of {len(by_kl)} latents"
        return Section("traversals", "Traversals", report_page.sheet(png, alt, caption))

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
        caption = "Decoded from z ~ N(0, 1): what the model takes for an image of this set."
        body = report_page.sheet(png, alt, caption)
        return Section("prior-samples", "Samples from the prior", body)

    def _latents(self) -> Section | None:
        latents = self._data.summary.get("latents")
        if not latents:
            return None
        active = [latent["variance"] > summary.ACTIVE_VARIANCE for latent in latents]
        note = report_page.text(
            f"{sum(active)} of {len(active)} latents are in use: their posterior mean varies by "
            f"more than {summary.ACTIVE_VARIANCE} over the records."
        )
        if "kl" not in latents[0]:
            return Section("latents", "Latents in use", note)
        kl = [latent["kl"] for latent in latents]
        plot = plots.bars(kl, active, size=(4.8, 3))
        self._plots["kl_per_latent"] = plot.light
        alt = f"Bar chart: kl of each of {len(kl)} latents, {min(kl):.2f} to {max(kl):.2f} nats"
        body = note + report_page.plots((plot, alt, "kl of each latent, a mean over all records"))
        return Section("latents", "Latents in use", body)

    def _nearest(self) -> Section | None:
        if not self._data.neighbours:
            return None
        rows, found = self._data.points.rows, []
        for of in self._data.neighbours:
            query = rows.ids[of[0]]
            for place in of:
                i, name = rows.ids[place], self._data.name_of(int(rows.labels[place]))
                image = self._data.images.get(self._data.points.key(place))
                if image is None:
                    continue
                first = place == of[0]
                alt = f"{i}, {name}" if first else f"{i}, {name}, near {query}"
                caption = f"{name}:" if first else name
                found.append(Tile((image,), caption, alt))
        if not found:
            table = [[rows.ids[of[0]], ", ".join(rows.ids[i] for i in of[1:])]
                     for of in self._data.neighbours]  # fmt: skip
            body = report_page.table(("id", "nearest"), table)
        else:
            body = report_page.tiles(found, num_columns=max(map(len, self._data.neighbours)))
        note = report_page.text(
            "A row a record: the record itself, then those whose embeddings are nearest among",
            f"{len(rows.ids):,} that were sampled.",
        )
        return Section("neighbours", "Nearest neighbours", note + body)

    def _probes(self) -> Section | None:
        if not self._data.points:
            return None
        rows, made_from = self._data.points.rows, self._data.manifest["made_from"]
        splits = [
            next(s for s in made_from["split"] if task.startswith(f"{made_from['name']}-{s}."))
            for task in self._data.points.tasks
        ]
        found = latent_space.accuracies(rows.columns["mean"], rows.labels, splits)
        note = report_page.text("How well the classes can be told from the embeddings alone.")
        return Section("probes", "Probes", note + report_page.accuracies(found))

    def _losses(self) -> Section | None:
        """Loss curves of the run that trained the model."""
        lines = self._data.run_metrics
        panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
        for name in ("loss", "reconstruction_loss", "kl"):
            for line in lines:
                value = line.get(name)
                if line["split"] != "test" and isinstance(value, int | float):
                    of_split = panels.setdefault(name, {}).setdefault(line["split"], [])
                    of_split.append((line["epoch"], value))
        if not panels:
            return None
        shown = []
        for name, lines_of in panels.items():
            plot = plots.curves(name, lines_of, size=(4.8, 3.4))
            self._plots[f"curve_{name}"] = plot.light
            alt = f"Line chart of {name} over the epochs of training: {', '.join(lines_of)}"
            shown.append((plot, alt, f"{name} after each epoch, nats per image"))
        return Section("loss-curves", "Loss curves", report_page.plots(*shown))

    def _lineage(self) -> Section:
        manifest, made_from = self._data.manifest, self._data.manifest["made_from"]
        values = {
            "export_id": manifest["export_id"],
            "dataset_id": manifest["dataset_id"] or f"source {made_from['fingerprint'][:16]}…",
            "model_id": manifest["model_id"],
        }
        for key, value in made_from.items():
            if key not in values and value not in (None, "") and key != "fingerprint":
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
        # Those that lack records first.
        order = sorted(shards, key=lambda task: -shards[task]["quarantined"])
        keys = ("read", "written", "quarantined")
        rows = [[task, *(shards[task][key] for key in keys)] for task in order]
        rows.insert(0, ["in all", *(self._data.manifest["records"][key] for key in keys)])
        return Section("counts", "Counts", report_page.table(("shard", *keys), rows))
