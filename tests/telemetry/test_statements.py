"""What spans say of SQL."""

import pytest

from quantplane_server.telemetry.statements import summary


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("SELECT a FROM orders WHERE b = 'secret'", "SELECT orders"),
        ("\n  select", "SELECT"),
        ("SELECT pg_notify($1, $2)", "SELECT"),
        ("SELECT a FROM unnest($1::text[]) AS s (a) JOIN x USING (a)", "SELECT"),
        ("SELECT a FROM unnest($1) s, (SELECT b FROM quotes) t", "SELECT quotes"),
        ("INSERT INTO orders (a) VALUES ($1)", "INSERT orders"),
        (
            "WITH a AS (SELECT b FROM c) INSERT INTO orders SELECT * FROM a",
            "INSERT orders",
        ),
        ("WITH a AS (UPDATE x SET y = 1 RETURNING *) SELECT * FROM a", "UPDATE x"),
        ("DELETE FROM event_log WHERE log = $1", "DELETE event_log"),
        ("BEGIN ISOLATION LEVEL REPEATABLE READ", "BEGIN"),
        ("COMMIT;", "COMMIT"),
        ("", ""),
    ],
)
def test_a_statement_is_told_by_its_operation_and_its_first_table(
    query: str, said: str
):
    assert str(summary(query)) == said
