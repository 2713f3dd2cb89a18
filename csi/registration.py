"""Registration with the kubelet: a socket in its plugins_registry directory that says where the driver listens.

Source: k8s.io/kubelet pkg/apis/pluginregistration/v1 (the kubelet watches the directory and calls GetInfo).
"""

import logging
from collections.abc import Callable

import grpc

from csi import DRIVER_NAME
from csi.options import printable
from csi.spec import registration_pb2, registration_pb2_grpc

log = logging.getLogger(__name__)

SOCKET_NAME = f"{DRIVER_NAME}-reg.sock"
API_VERSIONS = ("1.0.0",)
"""CSI versions as the kubelet knows them, not the specification's own numbers."""


class Registration(registration_pb2_grpc.RegistrationServicer):
    """`endpoint`: path of the CSI socket as the kubelet sees it. `on_refused` is called when the kubelet says no."""

    def __init__(self, endpoint: str, on_refused: Callable[[], None]) -> None:
        self._endpoint = endpoint
        self._on_refused = on_refused

    def GetInfo(
        self, request: registration_pb2.InfoRequest, context: grpc.ServicerContext
    ) -> registration_pb2.PluginInfo:
        return registration_pb2.PluginInfo(
            type="CSIPlugin", name=DRIVER_NAME, endpoint=self._endpoint, supported_versions=API_VERSIONS
        )

    def NotifyRegistrationStatus(
        self, request: registration_pb2.RegistrationStatus, context: grpc.ServicerContext
    ) -> registration_pb2.RegistrationStatusResponse:
        if request.plugin_registered:
            log.info("registered with the kubelet")
        else:
            log.error("the kubelet refused the registration: %s", printable(request.error))
            self._on_refused()
        return registration_pb2.RegistrationStatusResponse()
