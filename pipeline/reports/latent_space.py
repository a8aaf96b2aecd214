"""Analyses of embeddings: 2-D maps, nearest neighbours, probe classifiers.

All use scikit-learn on samples with fixed seeds, so the results are a function of the rows.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from pipeline.formats.tf_example import UNLABELLED

# t-SNE takes seconds for this many points, and minutes for ten times as many.
MAX_TSNE = 2_000
_PERPLEXITY = 30
_NUM_NEIGHBOURS = 5
_FOLDS = 5
# Below this total variance, all embeddings count as the same point.
_LEAST_VARIANCE = 1e-8


class Map(NamedTuple):
    """A map of embeddings in two dimensions."""

    name: str
    title: str
    points: np.ndarray  # (n, 2)
    labels: np.ndarray  # (n,) int64
    axes: tuple[str, str]


def maps(means: np.ndarray, labels: np.ndarray) -> list[Map]:
    """Maps embeddings to two dimensions: 2 latents are shown as they are, more by PCA and t-SNE.

    Pearson (1901), "On Lines and Planes of Closest Fit"; van der Maaten and Hinton (2008),
    "Visualizing Data using t-SNE".

    Args:
      means: float32 (n, latent_dim).
      labels: int64 (n,).

    Returns:
      The maps; none for fewer than 3 embeddings, or if all are the same.
    """
    from sklearn import decomposition, manifold
    from threadpoolctl import threadpool_limits

    count, latent_dim = means.shape
    if count < 3 or np.var(means, axis=0).sum() < _LEAST_VARIANCE:
        return []
    if latent_dim == 1:
        # The y axis is the label, with random jitter so that points do not cover each other.
        jitter = np.random.default_rng(0).uniform(-0.3, 0.3, count)
        points = np.stack([means[:, 0], labels + jitter], axis=1)
        axis = "label" if (labels != UNLABELLED).any() else ""
        return [Map("latent_space", "Latent 0", points, labels, ("latent 0", axis))]
    if latent_dim == 2:
        axes = ("latent 0", "latent 1")
        return [Map("latent_space", "Latent space", means, labels, axes)]
    pca = decomposition.PCA(2, svd_solver="full").fit(means)
    shares = [
        f"component {i + 1}: {s:.0%} of variance"
        for i, s in enumerate(pca.explained_variance_ratio_)
    ]
    pca_map = Map("pca", "PCA", pca.transform(means), labels, tuple(shares))
    tsne_means, tsne_labels = means[:MAX_TSNE], labels[:MAX_TSNE]
    perplexity = min(_PERPLEXITY, (len(tsne_means) - 1) / 3)
    tsne = manifold.TSNE(2, init="pca", random_state=0, perplexity=perplexity)
    # Its threads wait in busy loops, which costs more than it gains where others use the cores: of
    # three exports at once on 16 cores each spent minutes of CPU on 1,000 embeddings. The number of
    # threads changes no bit.
    with threadpool_limits(limits=1):
        points = tsne.fit_transform(tsne_means)
    tsne_map = Map("tsne", "t-SNE", points, tsne_labels, ("", ""))
    return [pca_map, tsne_map]


class Accuracies(NamedTuple):
    """Accuracies of classifiers on embeddings, in [0, 1]."""

    knn: float  # Of the 5 nearest neighbours.
    linear: float  # Of logistic regression.
    largest_class: float  # Of always predicting the most frequent class.
    rows_used: str  # The rows for training and evaluation, in words.


def accuracies(means: np.ndarray, labels: np.ndarray, splits: Sequence[str]) -> Accuracies | str:
    """k-NN and linear-probe accuracy of embeddings.

    Args:
      means: float32 (n, latent_dim).
      labels: int64 (n,); rows without a label are left out.
      splits: of each row.

    Returns:
      The accuracies, trained on train and evaluated on test if the rows have both splits, else
      by cross-validation; or the reason why there are none.
    """
    from sklearn import linear_model, model_selection, neighbors, pipeline, preprocessing

    is_labelled = labels != UNLABELLED
    means, labels, splits = means[is_labelled], labels[is_labelled], np.asarray(splits)[is_labelled]
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
        rows_used = f"trained on {train.sum():,} rows of train, evaluated on {test.sum():,} of test"
        return Accuracies(*scores, _largest_share(labels[test]), rows_used)
    classes, sizes = np.unique(labels, return_counts=True)
    mask = np.isin(labels, classes[sizes >= _FOLDS])
    if len(np.unique(labels[mask])) < 2:
        return f"they need at least two classes of at least {_FOLDS} rows"
    folds = model_selection.StratifiedKFold(_FOLDS, shuffle=True, random_state=0)
    scores = [
        model_selection.cross_val_score(m, means[mask], labels[mask], cv=folds).mean()
        for m in models
    ]
    rows_used = f"by {_FOLDS}-fold cross-validation on {mask.sum():,} rows"
    return Accuracies(*map(float, scores), _largest_share(labels[mask]), rows_used)


def _largest_share(labels: np.ndarray) -> float:
    return float(np.unique(labels, return_counts=True)[1].max() / len(labels))


def neighbours(
    means: np.ndarray, labels: np.ndarray, *, num_queries: int, num_neighbours: int
) -> list[list[int]]:
    """Nearest neighbours of a few query rows, by Euclidean distance.

    Args:
      means: float32 (n, latent_dim).
      labels: int64 (n,); queries are taken from all classes in turn.
      num_queries: number of query rows.
      num_neighbours: number of neighbours of each query.

    Returns:
      For each query a list of row indices: the query, then its neighbours.
    """
    from sklearn import neighbors

    by_class = [np.flatnonzero(labels == label)[:num_queries] for label in np.unique(labels)]
    interleaved: list[Any] = [
        rows[i] for i in range(num_queries) for rows in by_class if i < len(rows)
    ]
    queries = interleaved[:num_queries]
    count = min(num_neighbours + 1, len(means))
    search = neighbors.NearestNeighbors(n_neighbors=count).fit(means)
    nearest_rows = search.kneighbors(means[queries], return_distance=False)
    # Among equal embeddings the query itself may not come first.
    return [
        [int(query), *[int(i) for i in nearest if i != query][: count - 1]]
        for query, nearest in zip(queries, nearest_rows, strict=True)
    ]
