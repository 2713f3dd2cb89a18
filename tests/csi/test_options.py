"""Volume attributes: what is accepted, refused by name, and never believed."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from csi.credentials import choose_credentials
from csi.failure import BadRequest
from csi.options import OPTIONS, Policy, parse_options
from tests.csi.support import TOKENS_KEY

POLICY = Policy(endpoints=("https://minio.models.svc:9000",))
EPHEMERAL = {"csi.storage.k8s.io/ephemeral": "true", "csi.storage.k8s.io/pod.namespace": "team-a"}
TOKENS = '{"sts.amazonaws.com": {"token": "t", "expirationTimestamp": "2030"}}'


def test_all_options_of_a_persistent_volume() -> None:
    options = parse_options(
        "vol",
        {
            "uri": "hf://meta/llama",
            "revision": "main",
            "endpoint": "http://10.0.0.1:9000",
            "region": "eu-west-1",
            "role": "arn:aws:iam::123456789012:role/models",
            "pin": "true",
            "prefetch": "all",
            "isolation": "strict",
            "noexec": "false",
            "include": "*.safetensors, *.json",
            "exclude": "*.bin",
            "layout": "subdirectory:llama3-70b",
            "csi.storage.k8s.io/pod.namespace": "team-a",
            "csi.storage.k8s.io/serviceAccount.name": "vllm",
            "storage.kubernetes.io/csiProvisionerIdentity": "x",
        },
        POLICY,
    )
    assert options.source == "hf://meta/llama@main"
    assert options.include == ("*.safetensors", "*.json")
    assert (options.pin, options.noexec, options.layout) == (True, False, "llama3-70b")
    assert options.principal == "team-a/vllm"


@pytest.mark.parametrize(
    ("attributes", "named"),
    [
        ({}, "uri"),
        ({"uri": "file:///etc"}, "uri"),
        ({"uri": "s3:///key"}, "uri"),
        ({"uri": "s3://bucket/a/../b"}, "uri"),
        ({"uri": "s3://[bucket/x"}, "uri"),
        ({"uri": "https://169.254.169.254/latest"}, "uri"),
        ({"uri": "https://[::ffff:169.254.169.254]/"}, "uri"),
        ({"uri": "https://2852039166/"}, "uri"),
        ({"uri": "https://0xa9.0xfe.0xa9.0xfe/"}, "uri"),
        ({"uri": "https://metadata.google.internal./x"}, "uri"),
        ({"uri": "s3://b/x", "endpoint": "http://169.254.169.254"}, "endpoint"),
        ({"uri": "s3://b/x", "endpoint": "http://[fd00:ec2::254]"}, "endpoint"),
        ({"uri": "s3://b/x", "endpoint": "ftp://host"}, "endpoint"),
        ({"uri": "s3://b/x", "endpoint": "http://host:port"}, "endpoint"),
        ({"uri": "s3://b/x", "revision": "main"}, "revision"),
        ({"uri": "hf://a/b", "revision": "ma in"}, "revision"),
        ({"uri": "s3://b/x", "region": "eu west"}, "region"),
        ({"uri": "s3://b/x", "region": "x" * 64}, "region"),
        ({"uri": "s3://b/x", "pin": "yes"}, "pin"),
        ({"uri": "s3://b/x", "prefetch": "some"}, "prefetch"),
        ({"uri": "s3://b/x", "isolation": "strict"}, "isolation"),
        ({"uri": "s3://b/x", "layout": "subdirectory:.."}, "layout"),
        ({"uri": "s3://b/x", "layout": "subdirectory:a/b"}, "layout"),
        ({"uri": "s3://b/x", "include": "a," * 100}, "include"),
        ({"uri": "s3://b/x", "exclude": "**/a/" * 200 + "b"}, "exclude"),
        ({"uri": "s3://b/x\n"}, "uri"),
        ({"uri": "s3://b/x\x9b2J"}, "uri"),
        ({"uri": "s3://b/x\u2028y"}, "uri"),
        ({"uri": "s3://b/x", "include": "\u202etxt.*"}, "include"),
        ({"uri": "s3://b/" + "x" * 5000}, "uri"),
        ({"uri": "s3://b/x", "Pin": "true"}, "Pin"),
    ],
)
def test_wrong_option_is_named(attributes: dict[str, str], named: str) -> None:
    with pytest.raises(BadRequest, match=named):
        parse_options("vol", attributes, POLICY)


@pytest.mark.parametrize(
    ("attributes", "named"),
    [
        ({"uri": "s3://b/x", "pin": "true"}, "pin"),
        ({"uri": "s3://b/x", "endpoint": "https://evil"}, "endpoint"),
        ({"uri": "s3://b/x", "endpoint": "https://minio.models.svc:9001"}, "endpoint"),
        ({"uri": "https://evil/x"}, "uri"),
    ],
)
def test_ephemeral_volumes_get_only_what_the_admin_lists(attributes: dict[str, str], named: str) -> None:
    with pytest.raises(BadRequest, match=named):
        parse_options("vol", {**attributes, **EPHEMERAL}, POLICY)
    with pytest.raises(BadRequest, match=named):
        parse_options("csi-" + "0" * 64, attributes, POLICY)


def test_listed_endpoint_is_allowed_for_ephemeral_volumes() -> None:
    attributes = {"uri": "s3://b/x", "endpoint": "https://MINIO.models.svc:9000", **EPHEMERAL}
    assert parse_options("vol", attributes, POLICY).ephemeral


@pytest.mark.parametrize(
    ("uri", "extra", "secrets", "kind"),
    [
        ("s3://b/x", {}, {"AWS_ACCESS_KEY_ID": "a", "aws_secret_access_key": "b", "OTHER": "c"}, "static"),
        ("s3://b/x", {"role": "arn:x"}, {TOKENS_KEY: TOKENS}, "web_identity"),
        ("s3://b/x", {}, {TOKENS_KEY: TOKENS}, "chain"),
        ("s3://b/x", {}, {TOKENS_KEY: TOKENS.replace("sts.amazonaws.com", "pods.eks.amazonaws.com")}, "web_identity"),
        ("gs://b/x", {}, {TOKENS_KEY: TOKENS}, "web_identity"),
        ("hf://a/b", {}, {TOKENS_KEY: TOKENS}, "chain"),
        ("hf://a/b", {}, {"HF_TOKEN": "t"}, "static"),
        ("s3://b/x", EPHEMERAL, {}, "anonymous"),
    ],
)
def test_which_credentials_are_used(uri: str, extra: dict[str, str], secrets: dict[str, str], kind: str) -> None:
    policy = Policy(node_credentials=True)
    context = {"uri": uri, **extra}
    options = parse_options("vol", context, policy)
    assert choose_credentials(options, secrets, context, policy).kind == kind


@pytest.mark.parametrize(
    "secrets",
    [
        {"AWS_ACCESS_KEY_ID": "a"},
        {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": ""},
        {"HF_TOKEN": "t"},
        {"AWS_ACCESS_KEY_ID": "a\0", "AWS_SECRET_ACCESS_KEY": "b"},
        {TOKENS_KEY: "{"},
        {TOKENS_KEY: '{"a": {}}'},
        {TOKENS_KEY: '{"a": {"token": ""}}'},
    ],
)
def test_secret_that_cannot_work_is_refused_without_a_value(secrets: dict[str, str]) -> None:
    context = {"uri": "s3://b/x"}
    options = parse_options("vol", context, POLICY)
    with pytest.raises(BadRequest):
        choose_credentials(options, secrets, context, POLICY)


@settings(deadline=None, max_examples=300)
@given(st.dictionaries(st.sampled_from(OPTIONS) | st.text(max_size=8), st.text(max_size=40), max_size=6), st.booleans())
def test_any_attributes_are_parsed_or_refused(attributes: dict[str, str], with_uri: bool) -> None:
    if with_uri:
        attributes["uri"] = "s3://bucket/prefix"
    try:
        options = parse_options("vol", attributes, POLICY)
    except BadRequest:
        return
    assert options.scheme in ("s3", "gs", "az", "hf", "https")


@settings(deadline=None, max_examples=200)
@given(st.text(max_size=200), st.dictionaries(st.text(max_size=20), st.text(max_size=20), max_size=4))
def test_any_secret_is_taken_or_refused(tokens: str, secrets: dict[str, str]) -> None:
    context = {"uri": "gs://b/x"}
    options = parse_options("vol", context, POLICY)
    try:
        choose_credentials(options, {**secrets, TOKENS_KEY: tokens}, context, POLICY)
    except BadRequest:
        return
