import adala_mm.openmmlab  # noqa: F401  beside transformers 5, mmseg cannot be imported unaided
from adala_mm.utils.stack import import_quietly

import_quietly('mmseg.datasets')

from adala_mm.datasets.beacons import BeaconsDataset  # noqa: E402
from adala_mm.datasets.image_files import ImageFiles  # noqa: E402
from adala_mm.datasets.loading import LoadImageFromFile  # noqa: E402

__all__ = ['BeaconsDataset', 'ImageFiles', 'LoadImageFromFile']
