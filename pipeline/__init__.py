"""Ichor: head-CT DICOM into windowed Zarr arrays, and those arrays into a hemorrhage detector."""
