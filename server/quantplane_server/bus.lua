#!lua name=quantplane

-- The steps on the bus that must be atomic. One shard is:
--   meta    hash: epoch, number (of the last entry), appended (bytes, ever),
--           recorded (bytes of these that the database has), position (recorded)
--   stream  entries <epoch>-<number>, numbered without gaps; field "" holds the
--           `appended` of its entry, field "\0" its stamp, every other field is a key
--           with its records
--   latest  hash: key -> its last record
--   feed    hash per feed: session, last (batch here), through (accepted everywhere)

-- Before its first entry a shard is at 0-0, whatever its epoch.
local function head(meta)
  local state = redis.call('HMGET', meta, 'epoch', 'number')
  if not state[2] or state[2] == '0' then return '0-0' end
  return state[1] .. '-' .. state[2]
end

-- An epoch is the time in ms at which the shard was created: entries of a bus that
-- was lost and built anew never share a position with those of the old one.
local function create(meta)
  if redis.call('EXISTS', meta) == 0 then
    local now = redis.call('TIME')
    local epoch = string.format('%.0f', now[1] * 1000 + math.floor(now[2] / 1000))
    redis.call('HSET', meta, 'epoch', epoch, 'number', 0, 'appended', 0, 'recorded', 0)
  end
end

-- Begins a session of a feed, which ends every earlier one.
-- KEYS meta feed -> session, last, through, head
local function open_feed(keys)
  local meta, feed = keys[1], keys[2]
  create(meta)
  local session = redis.call('HINCRBY', feed, 'session', 1)
  local state = redis.call('HMGET', feed, 'last', 'through')
  return {session, tonumber(state[1] or 0), tonumber(state[2] or 0), head(meta)}
end

local STAMP = '\0'

-- Appends one entry to one shard, once. args[at] is the session, its keys are
-- args[at + 3 ...], three for each of `count`: key, records but the last, the last.
-- The stamp is among them: of all fields it alone is no one's latest.
local function append_entry(keys, args, at, count, terms)
  local meta, stream, latest, feed = unpack(keys)
  local known = redis.call('HMGET', feed, 'session', 'last')
  if not known[1] then return {'FORGOTTEN', ''} end -- the bus was lost since
  if known[1] ~= args[at] then return {'REPLACED', ''} end
  if tonumber(args[at + 1]) <= tonumber(known[2] or 0) then
    return {'APPENDED', head(meta)}
  end
  local state = redis.call('HMGET', meta, 'epoch', 'number', 'appended', 'recorded')
  local appended = tonumber(state[3])
  if appended - state[4] >= terms.cap then return {'FULL', ''} end

  local fields, values = {'', ''}, {}
  for i = at + 3, at + 3 * count, 3 do
    local records = args[i + 1] .. args[i + 2]
    appended = appended + #args[i] + #records
    fields[#fields + 1] = args[i]
    fields[#fields + 1] = records
    if args[i] ~= STAMP then
      values[#values + 1] = args[i]
      values[#values + 1] = args[i + 2]
    end
  end
  fields[2] = string.format('%.0f', appended)
  local number = string.format('%.0f', state[2] + 1)
  local position = state[1] .. '-' .. number
  redis.call('XADD', stream, position, unpack(fields))
  redis.call('HSET', latest, unpack(values))
  redis.call('HSET', meta, 'number', number, 'appended', fields[2])
  redis.call('HSET', feed, 'last', terms.last, 'through', terms.through)
  redis.call('EXPIRE', feed, terms.ttl)
  return {'APPENDED', position}
end

-- Appends a round to its shards. KEYS per shard: meta stream latest feed
-- ARGV last through cap_bytes feed_ttl_s, then per shard: session first count, and
-- count times: key, its records but the last, its last record
-- -> per shard: status, position
local function append(keys, args)
  local terms = {
    last = args[1], through = args[2], cap = tonumber(args[3]), ttl = args[4]
  }
  local replies, at = {}, 5
  for i = 1, #keys, 4 do
    local count = tonumber(args[at + 2])
    local shard = {keys[i], keys[i + 1], keys[i + 2], keys[i + 3]}
    replies[#replies + 1] = append_entry(shard, args, at, count, terms)
    at = at + 3 + 3 * count
  end
  return replies
end

-- Reads the last records and the position they are as of. KEYS meta latest
-- ARGV keys -> position, records
local function snapshot(keys, args)
  local records = {}
  for i = 1, #args, 4000 do -- unpack takes no more than 8,000
    local page = redis.call('HMGET', keys[2], unpack(args, i, math.min(i + 3999, #args)))
    for j = 1, #page do records[#records + 1] = page[j] end
  end
  return {head(keys[1]), records}
end

-- Notes what the database has, trims, and tells everyone. KEYS per shard: meta stream
-- ARGV channel message, then per shard: position appended trim_before ('' for nothing)
local function mark_recorded(keys, args)
  local at = 3
  for i = 1, #keys, 2 do
    local position, appended, trim_before = unpack(args, at, at + 2)
    -- Of a bus that was lost since, nothing is recorded yet.
    if redis.call('HGET', keys[i], 'epoch') == string.match(position, '^%d+') then
      redis.call('HSET', keys[i], 'position', position, 'recorded', appended)
    end
    if trim_before ~= '' then
      redis.call('XTRIM', keys[i + 1], 'MINID', trim_before)
    end
    at = at + 3
  end
  redis.call('PUBLISH', args[1], args[2])
end

-- Says how much is not recorded yet, and since when. KEYS meta stream
-- -> appended, recorded, the stamp of the first entry that is not recorded
local function backlog(keys)
  local state = redis.call('HMGET', keys[1], 'appended', 'recorded', 'position')
  local appended, recorded, stamp = state[1] or '0', state[2] or '0', ''
  if appended ~= recorded then
    local after = state[3] and '(' .. state[3] or '-'
    local entry = redis.call('XRANGE', keys[2], after, '+', 'COUNT', 1)[1]
    local fields = entry and entry[2] or {}
    for i = 1, #fields, 2 do
      if fields[i] == STAMP then stamp = fields[i + 1] end
    end
  end
  return {appended, recorded, stamp}
end

redis.register_function('quantplane_open_feed', open_feed)
redis.register_function('quantplane_append', append)
redis.register_function{
  function_name = 'quantplane_snapshot', callback = snapshot, flags = {'no-writes'}
}
redis.register_function('quantplane_mark_recorded', mark_recorded)
redis.register_function{
  function_name = 'quantplane_backlog', callback = backlog, flags = {'no-writes'}
}
