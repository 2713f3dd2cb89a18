"""The CSI driver: Identity, Node and a stateless Controller, in a process of its own (`python -m csi`)."""

DRIVER_NAME = "csi.cachefs.io"
"""The name in CSIDriver, StorageClass and PV objects. It never changes: pods that run refer to it."""

CSI_VERSION = "1.12.0"
"""The specification that csi/spec was generated from (`make csi-stubs`)."""
