"""The CSI driver: Identity, Node and a stateless Controller, in a process of its own (`python -m csi`)."""

DRIVER_NAME = "csi.cachefs.io"
"""The name in CSIDriver, StorageClass and PV objects. It never changes: pods that run refer to it."""
