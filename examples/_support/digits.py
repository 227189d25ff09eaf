"""scikit-learn's handwritten digits as a tensorflow-datasets builder: no network, no TensorFlow.

1,797 images of 8x8 pixels (E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI
Machine Learning Repository, 1998) ship inside scikit-learn. Importing this module registers the builder, so
`tfds.data_source("digits", split="train", builder_kwargs={"file_format": "array_record"})` works by name.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

TEST_IMAGES = 360
SPLIT_SEED = 0


class Digits(tfds.core.GeneratorBasedBuilder):
    """8x8 grey images of the digits 0 to 9: 1,437 to train on, 360 to test on.

    The images are stored as uint8 from 0 to 255 like those of other data sets; the source counts ink from 0
    to 16, and `round(ink * 255 / 16)` keeps its 17 levels apart. The split is random but seeded, and
    stratified: every class has the same share of the test set as of the whole, to within one image. The same
    writers occur on both sides, so accuracies are those on known handwriting (the source's own order
    separates the writers).
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Initial release."}  # noqa: RUF012

    def _info(self) -> tfds.core.DatasetInfo:
        # A Tensor and not an Image: tensorflow-datasets encodes images with TensorFlow.
        features = {
            "image": tfds.features.Tensor(shape=(8, 8, 1), dtype=np.uint8),
            "label": tfds.features.ClassLabel(num_classes=10),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description="Handwritten digits of 8x8 pixels, from scikit-learn.",
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", "label"),
            homepage="https://archive.ics.uci.edu/dataset/80",
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        source = load_digits()
        images = np.rint(source.images * (255 / 16)).astype(np.uint8)[..., None]
        labels = source.target
        train, test = train_test_split(
            np.arange(len(labels)), test_size=TEST_IMAGES, stratify=labels, random_state=SPLIT_SEED
        )
        return {
            "train": self._generate_examples(images, labels, train),
            "test": self._generate_examples(images, labels, test),
        }

    def _generate_examples(
        self, images: np.ndarray, labels: np.ndarray, indices: np.ndarray
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        for index in indices.tolist():
            yield index, {"image": images[index], "label": int(labels[index])}
