import adala_mm.openmmlab  # noqa: F401  beside transformers 5, mmseg cannot be imported unaided
from adala_mm.datasets.beacons import BeaconsDataset
from adala_mm.datasets.image_files import ImageFiles
from adala_mm.datasets.loading import LoadImageFromFile

__all__ = ['BeaconsDataset', 'ImageFiles', 'LoadImageFromFile']
