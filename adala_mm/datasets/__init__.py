from adala_mm.datasets.beacons import BeaconsDataset

__all__ = ['BeaconsDataset']
