"""Reads the images of planned samples: from disks and stores, replacing bad ones, ahead of time."""
