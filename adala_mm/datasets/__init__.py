from adala_mm.datasets.beacons import BeaconsDataset
from adala_mm.datasets.image_files import ImageFiles

__all__ = ['BeaconsDataset', 'ImageFiles']
