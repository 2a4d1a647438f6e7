#!lua name=quantplane

-- The steps on the bus that must be atomic. One shard is:
--   meta    hash: epoch, number (of the last entry), appended (bytes, ever),
--           recorded (bytes of these that the database has), position (recorded)
--   stream  entries <epoch>-<number>, numbered without gaps; field "" holds the
--           `appended` of its entry, every other field is a key with its records
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

-- Appends one entry, once. KEYS meta stream latest feed
-- ARGV session first last through cap_bytes feed_ttl_s, then per key: key, its
-- records but the last, its last record
-- -> status, position
local function append(keys, args)
  local meta, stream, latest, feed = keys[1], keys[2], keys[3], keys[4]
  local state = redis.call('HMGET', feed, 'session', 'last')
  if not state[1] then return {'FORGOTTEN', ''} end -- the bus was lost since
  if state[1] ~= args[1] then return {'REPLACED', ''} end
  if tonumber(args[2]) <= tonumber(state[2] or 0) then
    return {'APPENDED', head(meta)}
  end
  create(meta)
  local bytes = redis.call('HMGET', meta, 'appended', 'recorded')
  if bytes[1] - bytes[2] >= tonumber(args[5]) then return {'FULL', ''} end

  local size, fields, values = 0, {'', ''}, {}
  for i = 7, #args, 3 do
    local records = args[i + 1] .. args[i + 2]
    size = size + #args[i] + #records
    fields[#fields + 1] = args[i]
    fields[#fields + 1] = records
    values[#values + 1] = args[i]
    values[#values + 1] = args[i + 2]
  end
  fields[2] = redis.call('HINCRBY', meta, 'appended', size)
  redis.call('HINCRBY', meta, 'number', 1)
  local position = head(meta)
  redis.call('XADD', stream, position, unpack(fields))
  redis.call('HSET', latest, unpack(values))
  redis.call('HSET', feed, 'last', args[3], 'through', args[4])
  redis.call('EXPIRE', feed, args[6])
  return {'APPENDED', position}
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

-- Notes what the database has, and trims. KEYS meta stream
-- ARGV position appended trim_before ('' for nothing) channel message
local function mark_recorded(keys, args)
  redis.call('HSET', keys[1], 'position', args[1], 'recorded', args[2])
  if args[3] ~= '' then redis.call('XTRIM', keys[2], 'MINID', args[3]) end
  redis.call('PUBLISH', args[4], args[5])
end

redis.register_function('quantplane_open_feed', open_feed)
redis.register_function('quantplane_append', append)
redis.register_function{
  function_name = 'quantplane_snapshot', callback = snapshot, flags = {'no-writes'}
}
redis.register_function('quantplane_mark_recorded', mark_recorded)
