"""The Identity service."""

import threading
from collections.abc import Callable

from google.protobuf.wrappers_pb2 import BoolValue

import cachefs
from csi import DRIVER_NAME
from csi.failure import Failure
from csi.rpc import rpc
from csi.spec import csi_pb2, csi_pb2_grpc


class Identity(csi_pb2_grpc.IdentityServicer):
    """`is_ready` asks the server whether volumes can be published; without one (controller) the driver is ready."""

    def __init__(self, is_ready: Callable[[], bool] | None) -> None:
        self._is_ready = is_ready
        self._was_ready = threading.Event()

    @rpc
    def GetPluginInfo(self, request: csi_pb2.GetPluginInfoRequest) -> csi_pb2.GetPluginInfoResponse:
        return csi_pb2.GetPluginInfoResponse(name=DRIVER_NAME, vendor_version=cachefs.__version__)

    @rpc
    def GetPluginCapabilities(
        self, request: csi_pb2.GetPluginCapabilitiesRequest
    ) -> csi_pb2.GetPluginCapabilitiesResponse:
        service = csi_pb2.PluginCapability.Service(type=csi_pb2.PluginCapability.Service.CONTROLLER_SERVICE)
        return csi_pb2.GetPluginCapabilitiesResponse(capabilities=[csi_pb2.PluginCapability(service=service)])

    @rpc
    def Probe(self, request: csi_pb2.ProbeRequest) -> csi_pb2.ProbeResponse:
        return csi_pb2.ProbeResponse(ready=BoolValue(value=self._ready()))

    def _ready(self) -> bool:
        # Not ready only while starting: to restart the driver does not bring back a server that went away.
        if self._is_ready is None or self._was_ready.is_set():
            return True
        try:
            ready = self._is_ready()
        except Failure:
            return False
        if ready:
            self._was_ready.set()
        return ready
