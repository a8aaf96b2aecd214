"""What embeddings look like and what they are good for: maps, neighbours, probes.

By scikit-learn, with fixed seeds and on samples: a function of the rows.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

# t-SNE takes seconds for so many points, and minutes for ten times as many.
MAX_TSNE = 2_000
_PERPLEXITY = 30
_NUM_NEIGHBOURS = 5
_FOLDS = 5
# Embeddings that vary less than this in all are of no use to look at.
_LEAST_VARIANCE = 1e-8


class Map(NamedTuple):
    """Embeddings in the plane."""

    name: str
    title: str
    points: np.ndarray  # (n, 2)
    labels: np.ndarray  # (n,) int64
    axes: tuple[str, str]


def maps(means: np.ndarray, labels: np.ndarray) -> list[Map]:
    """Embeddings in the plane: as they are if they have 2 numbers, else by PCA and t-SNE.

    Pearson (1901), "On Lines and Planes of Closest Fit"; van der Maaten and Hinton (2008),
    "Visualizing Data using t-SNE".

    Args:
      means: float32 (n, latent_dim).
      labels: int64 (n,).

    Returns:
      Maps; none if there is nothing to see, since all points are one.
    """
    from sklearn import decomposition, manifold

    count, latent_dim = means.shape
    if count < 3 or np.var(means, axis=0).sum() < _LEAST_VARIANCE:
        return []
    if latent_dim == 1:
        # By class, and spread a little at random so that points don't hide each other.
        spread = np.random.default_rng(0).uniform(-0.3, 0.3, count)
        points = np.stack([means[:, 0], labels + spread], axis=1)
        return [Map("latent_space", "The latent", points, labels, ("latent 0", "label"))]
    if latent_dim == 2:
        axes = ("latent 0", "latent 1")
        return [Map("latent_space", "The latent space", means, labels, axes)]
    pca = decomposition.PCA(2, svd_solver="full").fit(means)
    shares = [
        f"component {i + 1}: {s:.0%} of variance"
        for i, s in enumerate(pca.explained_variance_ratio_)
    ]
    found = [Map("pca", "PCA", pca.transform(means), labels, tuple(shares))]
    some, of_some = means[:MAX_TSNE], labels[:MAX_TSNE]
    perplexity = min(_PERPLEXITY, (len(some) - 1) / 3)
    tsne = manifold.TSNE(2, init="pca", random_state=0, perplexity=perplexity)
    return [*found, Map("tsne", "t-SNE", tsne.fit_transform(some), of_some, ("", ""))]


class Accuracies(NamedTuple):
    """How well classes can be told from embeddings; shares of 1."""

    knn: float  # The nearest five.
    linear: float  # Logistic regression.
    largest_class: float  # What always naming the most frequent class gives.
    how: str  # On which rows.


def accuracies(means: np.ndarray, labels: np.ndarray, splits: Sequence[str]) -> Accuracies | str:
    """k-NN and linear-probe accuracy of embeddings.

    Args:
      means: float32 (n, latent_dim).
      labels: int64 (n,).
      splits: of each row.

    Returns:
      The accuracies, taught on train and measured on test if both are there, else by
      cross-validation; or why there are none.
    """
    from sklearn import linear_model, model_selection, neighbors, pipeline, preprocessing

    splits = np.asarray(splits)
    train, test = splits == "train", splits == "test"
    models = (
        neighbors.KNeighborsClassifier(_NUM_NEIGHBOURS),
        pipeline.make_pipeline(
            preprocessing.StandardScaler(), linear_model.LogisticRegression(max_iter=1000)
        ),
    )
    if train.sum() > _NUM_NEIGHBOURS and test.any() and len(np.unique(labels[train])) > 1:
        scores = [
            m.fit(means[train], labels[train]).score(means[test], labels[test]) for m in models
        ]
        how = f"taught on {train.sum():,} rows of train, measured on {test.sum():,} of test"
        return Accuracies(*scores, _largest(labels[test]), how)
    classes, sizes = np.unique(labels, return_counts=True)
    kept = np.isin(labels, classes[sizes >= _FOLDS])
    if len(np.unique(labels[kept])) < 2:
        return f"they need two classes of at least {_FOLDS} rows"
    folds = model_selection.StratifiedKFold(_FOLDS, shuffle=True, random_state=0)
    scores = [
        model_selection.cross_val_score(m, means[kept], labels[kept], cv=folds).mean()
        for m in models
    ]
    how = f"by {_FOLDS}-fold cross-validation on {kept.sum():,} rows"
    return Accuracies(*map(float, scores), _largest(labels[kept]), how)


def _largest(labels: np.ndarray) -> float:
    return float(np.unique(labels, return_counts=True)[1].max() / len(labels))


def neighbours(
    means: np.ndarray, labels: np.ndarray, *, num_queries: int, num_neighbours: int
) -> list[list[int]]:
    """The nearest rows of some rows, by Euclidean distance.

    Args:
      means: float32 (n, latent_dim).
      labels: int64 (n,); queries are taken from all classes in turn.
      num_queries: how many rows to look at.
      num_neighbours: how many neighbours of each.

    Returns:
      Lists of places, the query's own first.
    """
    from sklearn import neighbors

    by_class = [np.flatnonzero(labels == label)[:num_queries] for label in np.unique(labels)]
    turns: list[Any] = [of[i] for i in range(num_queries) for of in by_class if i < len(of)]
    queries = turns[:num_queries]
    count = min(num_neighbours + 1, len(means))
    search = neighbors.NearestNeighbors(n_neighbors=count).fit(means)
    found = search.kneighbors(means[queries], return_distance=False)
    # Of equal embeddings the query itself may not come first.
    return [
        [int(query), *[int(i) for i in of if i != query][: count - 1]]
        for query, of in zip(queries, found, strict=True)
    ]
