"""The manifests render, are valid Kubernetes, are hardened, and fit the driver's own parsers."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from cachefs.config import NodeConfig, ServerConfig
from cachefs.errors import UsageError
from cachefs.node_policy import volume_location
from csi import DRIVER_NAME
from csi.__main__ import parser
from csi.controller import volume_context
from csi.options import Policy, parse_options
from tests.manifests.support import MANIFESTS, REPOSITORY, Document, kind, load, package, pods, render, tool

RENDERED = ("base", "overlays/eks", "overlays/gke", "overlays/kind")
COMPONENTS = sorted(path.parent.name for path in MANIFESTS.glob("components/*/kustomization.yaml"))
EXAMPLES = sorted(MANIFESTS.glob("examples/*.yaml"))
PRIVILEGED = {"keeper", "driver"}
KUBERNETES_VERSION = "1.37.0"


@pytest.fixture(scope="module", params=RENDERED)
def rendered(request: pytest.FixtureRequest) -> list[Document]:
    return render(MANIFESTS / request.param)


def validate(document: Document) -> None:
    """Against the Kubernetes schemas (strict: an unknown field is an error) and the committed ones."""
    schemas, jsonschema = package("kubernetes_validate"), package("jsonschema")
    group, _, version = document["apiVersion"].rpartition("/")
    name = "-".join(part for part in (document["kind"].lower(), group.removesuffix(".k8s.io"), version) if part)
    own = MANIFESTS / "schemas" / f"{name}.json"
    if own.exists():
        jsonschema.validate(document, json.loads(own.read_text()))
    if own.exists() and "kserve" in group:
        return
    schemas.validate(document, KUBERNETES_VERSION, strict=True)


def test_every_document_is_valid(rendered: list[Document]) -> None:
    assert len(rendered) > 10
    for document in rendered:
        validate(document)


def test_a_misspelt_field_would_be_found() -> None:
    document = kind(render(MANIFESTS / "base"), "CSIDriver")[0]
    document["spec"]["podInfoOnMuont"] = True
    with pytest.raises(package("jsonschema").ValidationError):
        validate(document)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_is_valid(path: Path) -> None:
    for document in load(path.read_text()):
        validate(document)


@pytest.mark.parametrize("component", COMPONENTS)
def test_every_component_renders_on_the_base(component: str, tmp_path: Path) -> None:
    # kustomize refuses absolute paths: one relative to where the kustomization lies.
    relative = "../" * (len(tmp_path.resolve().parts) - 1) + str(MANIFESTS).lstrip("/")
    text = f"resources:\n  - {relative}/base\ncomponents:\n  - {relative}/components/{component}\n"
    (tmp_path / "kustomization.yaml").write_text(
        f"apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\n{text}"
    )
    documents = render(tmp_path)
    assert documents != render(MANIFESTS / "base")
    for document in documents:
        validate(document)


def test_only_keeper_and_driver_are_privileged(rendered: list[Document]) -> None:
    components = set()
    for component, spec in pods(rendered):
        components.add(component)
        assert not spec.get("hostNetwork")
        assert not spec.get("hostPID")
        assert not spec.get("hostIPC")
        for container in spec["containers"]:
            security = container["securityContext"]
            assert security["readOnlyRootFilesystem"] is True
            if component in PRIVILEGED:
                assert security["privileged"] is True
                continue
            assert not security.get("privileged")
            assert security["allowPrivilegeEscalation"] is False
            assert security["capabilities"] == {"drop": ["ALL"]}
            assert spec["securityContext"]["runAsNonRoot"] is True
            assert spec["securityContext"]["runAsUser"] == 65534
            assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert components == {"keeper", "server", "driver", "controller"}


def test_bidirectional_propagation_is_only_where_mounts_are_made(rendered: list[Document]) -> None:
    found = set()
    for component, spec in pods(rendered):
        for container in spec["containers"]:
            for mount in container["volumeMounts"]:
                if mount.get("mountPropagation") == "Bidirectional":
                    found.add((component, mount["mountPath"]))
    assert found == {("keeper", "/var/lib/cachefs"), ("driver", "/var/lib/kubelet")}


def test_server_sees_no_kubelet_path_and_no_token(rendered: list[Document]) -> None:
    (server,) = [spec for component, spec in pods(rendered) if component == "server"]
    paths = [volume["hostPath"]["path"] for volume in server["volumes"] if "hostPath" in volume]
    assert all("kubelet/" not in path and path != "/var/lib/kubelet" for path in paths)
    assert server["automountServiceAccountToken"] is False


def test_images_are_pinned_and_containers_bounded(rendered: list[Document]) -> None:
    for _component, spec in pods(rendered):
        assert spec["priorityClassName"] == "cachefs-node"
        for container in spec["containers"]:
            assert re.fullmatch(r"[\w./-]+:v?\d+\.\d+\.\d+", container["image"]), container["image"]
            assert set(container["resources"]["requests"]) == {"cpu", "memory"}
            assert "memory" in container["resources"]["limits"]


def test_keeper_changes_only_on_delete_the_others_roll(rendered: list[Document]) -> None:
    sets = {
        document["metadata"]["name"]: document["spec"]["updateStrategy"] for document in kind(rendered, "DaemonSet")
    }
    assert sets["cachefs-keeper"]["type"] == "OnDelete"
    assert sets["cachefs-server"]["type"] == "RollingUpdate"
    assert sets["cachefs-driver"]["type"] == "RollingUpdate"


def test_selectors_and_policies_meet_their_pods(rendered: list[Document]) -> None:
    components = {component for component, _spec in pods(rendered)}
    for document in rendered:
        if document["kind"] in ("DaemonSet", "Deployment"):
            selector = document["spec"]["selector"]["matchLabels"]
            assert selector.items() <= document["spec"]["template"]["metadata"]["labels"].items()
    covered = set()
    for policy in kind(rendered, "NetworkPolicy"):
        selector = policy["spec"]["podSelector"]
        covered |= {selector.get("matchLabels", {}).get("app.kubernetes.io/component")} - {None}
        for expression in selector.get("matchExpressions", []):
            covered |= set(expression["values"])
    assert covered == components


def test_namespaced_objects_are_in_the_namespace(rendered: list[Document]) -> None:
    cluster = {"Namespace", "CSIDriver", "PriorityClass", "ClusterRole", "ClusterRoleBinding", "StorageClass"}
    for document in rendered:
        expected = None if document["kind"] in cluster else "cachefs-system"
        assert document["metadata"].get("namespace") == expected, document["metadata"]["name"]
        for subject in document.get("subjects", []):
            assert subject["namespace"] == "cachefs-system"


def csi_arguments(spec: Document) -> list[list[str]]:
    """The flags of every container that runs `cachefs csi`."""
    return [container["args"][1:] for container in spec["containers"] if container["args"][0] == "csi"]


def test_driver_flags_are_the_drivers_own(rendered: list[Document]) -> None:
    seen = []
    for component, spec in pods(rendered):
        for flags in csi_arguments(spec):
            args = parser().parse_args(flags)
            seen.append((component, args.mode))
            if args.mode == "node":
                assert f"/{DRIVER_NAME}/" in args.endpoint
                assert args.node_id == "$(NODE_NAME)"
                (container,) = spec["containers"]
                parser().parse_args(container["livenessProbe"]["exec"]["command"][2:])
    assert sorted(seen) == [("controller", "controller"), ("driver", "node")]


def test_paths_of_the_three_processes_fit_together(rendered: list[Document]) -> None:
    specs = dict(pods(rendered))
    keeper, server, driver = (specs[name]["containers"][0] for name in ("keeper", "server", "driver"))
    assert keeper["args"] == ["keeper", "--node-dir=/var/lib/cachefs"]
    assert server["args"][:2] == ["serve", "--node-dir=/var/lib/cachefs"]
    args = parser().parse_args(driver["args"][1:])
    assert str(args.server_socket) == "/var/lib/cachefs/run/control.sock"
    assert str(args.mount_root) == "/var/lib/cachefs/root"
    assert args.server_uid == [specs["server"]["securityContext"]["runAsUser"]]
    assert "/var/lib/cachefs/run" in [mount["mountPath"] for mount in server["volumeMounts"]]


def test_provisioner_tells_the_claims_name(rendered: list[Document]) -> None:
    (controller,) = [spec for component, spec in pods(rendered) if component == "controller"]
    (provisioner,) = [item for item in controller["containers"] if item["name"] == "provisioner"]
    assert "--extra-create-metadata" in provisioner["args"]


def test_tokens_come_where_the_driver_looks_for_them(rendered: list[Document]) -> None:
    (driver_object,) = kind(rendered, "CSIDriver")
    (flags,) = [csi_arguments(spec)[0] for component, spec in pods(rendered) if component == "driver"]
    if "tokenRequests" in driver_object["spec"]:
        in_secrets = driver_object["spec"].get("serviceAccountTokenInSecrets", False)
        assert in_secrets != ("--tokens-from-context" in flags)


def storage_classes() -> list[Document]:
    found = [document for name in RENDERED for document in kind(render(MANIFESTS / name), "StorageClass")]
    return found + [document for path in EXAMPLES for document in kind(load(path.read_text()), "StorageClass")]


def test_storage_classes_make_volumes_that_the_driver_takes() -> None:
    metadata = {"csi.storage.k8s.io/pvc/name": "llama3", "csi.storage.k8s.io/pvc/namespace": "default"}
    classes = storage_classes()
    assert len(classes) == 5
    for storage_class in classes:
        assert storage_class["provisioner"] == DRIVER_NAME
        context = volume_context({**storage_class["parameters"], **metadata})
        assert "$" not in parse_options("cachefs-1", context, Policy()).source


def server_takes(context: Document, documents: list[Document]) -> None:
    """Raises UsageError unless the server of these manifests mounts such a volume."""
    (args,) = [spec["containers"][0]["args"] for component, spec in pods(documents) if component == "server"]
    allowed = tuple(arg.partition("=")[2] for arg in args if arg.startswith("--allow-endpoint="))
    server = ServerConfig(state_dir=Path("/cache"), runtime_dir=Path("/run"), cache_bytes_max=0)
    node = NodeConfig(server=server, keeper_socket=Path("/run/keeper.sock"), allow_endpoints=allowed)
    volume_location(context["uri"], context.get("endpoint"), context.get("region"), node)


def test_volumes_of_classes_and_examples_are_mounted_by_the_server(rendered: list[Document]) -> None:
    for storage_class in kind(rendered, "StorageClass"):
        server_takes(storage_class["parameters"], rendered)
    for path in EXAMPLES:
        for document in load(path.read_text()):
            for volume in csi_volumes(document):
                server_takes(volume["volumeAttributes"], rendered)
            if document["kind"] == "StorageClass":
                server_takes(document["parameters"], rendered)
    for refused in ({"uri": "hf://org/model"}, {"uri": "s3://models/x", "endpoint": "https://elsewhere"}):
        with pytest.raises(UsageError):
            server_takes(refused, rendered)


def test_manifests_and_flags_that_the_documents_name_exist() -> None:
    for name in ("kubernetes.md", "security.md", "upgrade.md"):
        text = (REPOSITORY / "docs" / name).read_text()
        for path in re.findall(r"manifests/[\w/-]+(?:\.yaml)?", text):
            assert (REPOSITORY / path).exists(), path
        for path in re.findall(r"`([\w-]+\.yaml)`", text):
            assert (MANIFESTS / "examples" / path).exists(), path
        for component in re.findall(r"`(components/[\w-]+)`", text):
            assert (MANIFESTS / component / "kustomization.yaml").exists(), component
        objects = {(d["kind"].lower(), d["metadata"]["name"]) for d in render(MANIFESTS / "base")}
        for sort, found in re.findall(r"(daemonset|deployment)/([\w-]+)", text):
            assert (sort, found) in objects, found


def csi_volumes(document: Any) -> list[Document]:
    """Every `csi:` source of our driver in a document."""
    if isinstance(document, dict):
        own = [document["csi"]] if isinstance(document.get("csi"), dict) else []
        return own + [found for value in document.values() for found in csi_volumes(value)]
    if isinstance(document, list):
        return [found for value in document for found in csi_volumes(value)]
    return []


def test_volumes_of_the_examples_are_taken_by_the_driver() -> None:
    count = 0
    for path in EXAMPLES:
        for document in load(path.read_text()):
            for volume in csi_volumes(document):
                assert volume["driver"] == DRIVER_NAME
                persistent = "volumeHandle" in volume
                context = {
                    **volume["volumeAttributes"],
                    "csi.storage.k8s.io/ephemeral": str(not persistent).lower(),
                    "csi.storage.k8s.io/pod.namespace": "default",
                }
                parse_options(volume.get("volumeHandle", "csi-1"), context, Policy())
                count += 1
    assert count == 2


def test_claims_secrets_and_classes_of_the_examples_fit_together() -> None:
    for path in EXAMPLES:
        documents = load(path.read_text())
        names = {(document["kind"], document["metadata"]["name"]) for document in documents}
        text = path.read_text()
        for claim in re.findall(r"claimName: (\S+)", text):
            assert ("PersistentVolumeClaim", claim) in names, path
        for claim in re.findall(r"pvc://([\w-]+)/", text):
            assert ("PersistentVolumeClaim", claim) in names, path
        for secret in re.findall(r"nodePublishSecretRef:\n\s+name: (\S+)", text):
            assert ("Secret", secret) in names, path


def test_dockerfile_passes_hadolint() -> None:
    done = subprocess.run(
        [tool("hadolint"), str(REPOSITORY / "Dockerfile")], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout


def test_dockerfile_is_multi_stage_pinned_and_not_root() -> None:
    text = (REPOSITORY / "Dockerfile").read_text()
    bases = re.findall(r"^FROM (\S+)", text, re.MULTILINE)
    assert len(bases) == 2
    assert len(set(bases)) == 1
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-bookworm", bases[0])
    assert re.search(r"^USER 65534", text, re.MULTILINE)
    last = text.split("FROM ")[-1]
    assert "gcc" not in last
    assert not re.search(r"^ADD |curl |wget ", text, re.MULTILINE)


def test_dockerignore_lets_in_what_the_dockerfile_copies() -> None:
    allowed = {line[1:] for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied: set[str] = set()
    for sources in re.findall(r"^COPY (?!--from)(.+) \S+$", (REPOSITORY / "Dockerfile").read_text(), re.MULTILINE):
        copied |= set(sources.split())
    assert copied == allowed
    for name in copied:
        assert (REPOSITORY / name).exists(), name
