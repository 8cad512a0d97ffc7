"""The command line of tower-encode."""

import pytest

from model.errors import ConfigError
from pipelines.encode_users import main
from pipelines.options import EncodeSettings, make_parser, parse_settings
from pipelines.runs import iso, parse_as_of_us, run_id_of

NEEDED = ["--events", "e", "--registry", "r", "--states", "s"]


def parse(*more: str, **environment: str) -> EncodeSettings:
    return parse_settings([*NEEDED, *more], environment)


def test_redis_url_comes_from_the_flag_then_the_environment() -> None:
    assert parse(REDIS_URL="redis://a").redis_url == "redis://a"
    assert parse("--redis-url", "redis://b", REDIS_URL="redis://a").redis_url == "redis://b"
    assert parse("--no-redis", REDIS_URL="redis://a").redis_url is None
    with pytest.raises(ConfigError, match="--no-redis"):
        parse()
    with pytest.raises(ConfigError, match="--no-redis sends nothing"):
        parse("--no-redis", "--redis-url", "redis://b")


def test_unknown_flags_go_to_beam_and_misspelt_ones_do_not() -> None:
    assert parse("--no-redis", "--direct_num_workers", "2").beam_args == ("--direct_num_workers", "2")
    with pytest.raises(ConfigError, match="did you mean --shards"):
        parse("--no-redis", "--shard=8")


@pytest.mark.parametrize("flags", [("--shards", "0"), ("--batch-tokens", "0"), ("--as-of", "yesterday")])
def test_bad_values_say_what_was_wanted(flags: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=flags[0]):
        parse("--no-redis", *flags)
    assert main([*NEEDED, "--no-redis", *flags]) == 2
    assert flags[1] in capsys.readouterr().err


def test_the_fault_comes_from_the_environment_alone() -> None:
    assert parse("--no-redis").fault.at is None
    assert parse("--no-redis", HT_CRASH_AT="after-read").fault.at == "after-read"


def test_help_shows_examples() -> None:
    text = make_parser().format_help()
    assert "examples" in text
    assert "--as-of" in text


def test_as_of_times() -> None:
    moment = 1_508_036_400_000_000
    for text in ("2017-10-15T03:00:00Z", "20171015T030000Z", "2017-10-15 03:00:00", "2017-10-15T05:00:00+02:00"):
        assert parse_as_of_us(text) == moment
    assert run_id_of(moment) == "20171015T030000Z"
    assert iso(moment) == "2017-10-15T03:00:00Z"
    with pytest.raises(ConfigError, match="whole second"):
        parse_as_of_us("2017-10-15T03:00:00.5Z")
    with pytest.raises(ConfigError, match="whole second"):
        run_id_of(moment + 1)
